"""Where a denoiser comes from: a folder, or the sandbox."""

from typing import Literal, get_args

from kdlm.diffusion import Denoiser, load_denoiser
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

    def load(self) -> Denoiser:
        """Open the weights. Raises ValueError when there is no such model, or it cannot take a guidance scale."""
        denoiser = super().load()
        return denoiser.with_guidance() if self.guided and not denoiser.takes_guidance else denoiser
