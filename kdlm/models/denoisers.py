"""Where a denoiser comes from: a folder, or the sandbox."""

from typing import Literal, Self, get_args

from pydantic import model_validator

from kdlm.diffusion import Denoiser, load_denoiser
from kdlm.models.adapters import Lora
from kdlm.section import Section

SandboxDenoiser = Literal["digits-denoiser", "ring-denoiser", "ring-exact"]


class DenoiserSource(Section):
    """A diffusion or flow model."""

    name: Literal["denoiser"] = "denoiser"
    path: str
    """Folder that holds `denoiser.json`, or `sandbox:digits-denoiser`, `sandbox:ring-denoiser`, `sandbox:ring-exact`
    (the ring's own posterior mean, which does not train)."""

    def load(self) -> Denoiser:
        """Open the weights. Raises ValueError naming the path when there is no such model."""
        if not self.path.startswith("sandbox:"):
            return load_denoiser(self.path)
        from kdlm.sandbox import build

        name = self.path.removeprefix("sandbox:")
        if name not in get_args(SandboxDenoiser):
            raise ValueError(f"the sandbox has no denoiser {name!r}. One of: {', '.join(get_args(SandboxDenoiser))}")
        return load_denoiser(build(name))

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
