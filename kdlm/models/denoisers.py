"""Where a denoiser comes from: a folder, a model of diffusers, or the sandbox."""

from pathlib import Path
from typing import Literal, cast, get_args

import torch
from pydantic import Field

from kdlm.diffusion import Denoiser, load_denoiser, look_for_denoiser
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
