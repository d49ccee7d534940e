"""Where a denoiser comes from: a folder, a model of diffusers, or the sandbox."""

from pathlib import Path
from typing import Literal, Self, cast, get_args

import torch
from pydantic import Field, model_validator

from kdlm.diffusion import Denoiser, load_denoiser, look_for_denoiser
from kdlm.models.adapters import Lora
from kdlm.section import Section

SandboxDenoiser = Literal["digits-denoiser", "ring-denoiser", "ring-exact"]


class DenoiserSource(Section):
    """A diffusion or flow model."""

    name: Literal["denoiser"] = "denoiser"
    path: str
    """Folder that holds `denoiser.json`; folder or hub id of a model or pipeline of diffusers; or
    `sandbox:digits-denoiser`, `sandbox:ring-denoiser`, `sandbox:ring-exact` (the ring's own posterior mean, which does
    not train)."""
    subfolder: str | None = None
    """Where the network lies in a pipeline of diffusers; by default `unet` or `transformer`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights. Train in float32, or bfloat16."""
    sample_size: int | None = Field(None, ge=1)
    """Height and width of a sample (of latents: of the latent), by default those in the model's configuration."""
    null_class: int | None = Field(None, ge=0)
    """The label that stands for none, where the network has one and does not say which. Guidance compares with it."""
    null_condition: str | None = None
    """What stands for no text, which guidance compares with: a safetensors file with the `encoder_hidden_states`
    `[length, width]` of the empty prompt (and its `pooled_projections`), or `zeros`."""

    def load(self) -> Denoiser:
        """Open the weights. Raises ValueError naming the path when there is no such model."""
        from kdlm.sandbox import build

        path = build(self._sandboxed()) if self.path.startswith("sandbox:") else self.path
        options = {key: getattr(self, key) for key in ("subfolder", "revision", "sample_size", "null_class")}
        return load_denoiser(path, dtype=getattr(torch, self.dtype), null_condition=self.null_condition, **options)

    def look(self) -> str:
        """Return the kind of denoiser, without its weights. Raises ValueError when there is no such model."""
        if self.path.startswith("sandbox:"):
            return self._sandboxed()
        if self.null_condition not in (None, "zeros") and not Path(self.null_condition).is_file():
            raise ValueError(f"null_condition: {self.null_condition}: no such file")
        return look_for_denoiser(self.path, self.subfolder, self.revision)

    def _sandboxed(self) -> SandboxDenoiser:
        name = self.path.removeprefix("sandbox:")
        if name not in get_args(SandboxDenoiser):
            raise ValueError(f"the sandbox has no denoiser {name!r}. One of: {', '.join(get_args(SandboxDenoiser))}")
        return cast("SandboxDenoiser", name)

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        return self.path


class DenoiserStudent(DenoiserSource):
    """A denoiser to train: for most methods the teacher's own weights to begin with."""

    guided: bool = False
    """Give it a guidance scale as an input, if it has none; until that is trained it answers as before."""

    train_only: list[str] = []
    """Modules of the network that train, e.g. `[guidance]`; the rest stays as it is. By default all of it trains."""
    lora: Lora | None = None
    """Train adapters instead of the weights."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.lora is not None and self.train_only:
            raise ValueError("lora: it says what trains already (lora.modules_to_save): leave train_only out")
        if self.lora is not None and self.lora.export != "merged":
            raise ValueError("lora.export: of a denoiser's adapters only `merged` can be opened again")
        return self

    def load(self) -> Denoiser:
        """Open the weights. Raises ValueError when there is no such model, or it lacks what the section asks of it."""
        denoiser = super().load()
        denoiser = denoiser.with_guidance() if self.guided and not denoiser.takes_guidance else denoiser
        return train_only(denoiser, self.train_only) if self.train_only else denoiser


def train_only(denoiser: Denoiser, modules: list[str]) -> Denoiser:
    """Freeze all of a network but some of its modules. Raises ValueError for one that it does not have."""
    named = dict(denoiser.named_modules())
    if unknown := [name for name in modules if name not in named]:
        top = [name for name in named if name and "." not in name]
        raise ValueError(f"student.train_only: no module {unknown[0]!r} in the network; it has {', '.join(top)}")
    denoiser.requires_grad_(False)
    for name in modules:
        named[name].requires_grad_(True)
    return denoiser
