"""The denoisers: of the digits and of the ring, trained by EDM's loss, and the ring's exact one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kdlm.sandbox.language_models import torch_release
from kdlm.sandbox.progress import Progress


@dataclass(frozen=True)
class TrainedDenoiser:
    """A residual MLP trained by EDM's denoising loss, with the average of its weights kept.

    Attributes:
        data: `digits`, on condition of their labels, a tenth of which are hidden; or `ring`.
        width, depth: of the network.
        steps, batch, learning_rate: of Adam.
        mean, std: of the logarithm of the noise ratio that it trains at.
    """

    data: Literal["digits", "ring"]
    width: int
    depth: int
    steps: int
    batch: int = 128
    learning_rate: float = 2e-3
    mean: float = -0.8
    std: float = 1.4
    seed: int = 0

    needs = ()

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        from kdlm.sandbox.denoising import pretrain_denoiser

        denoiser, figures = pretrain_denoiser(self, progress, name)
        denoiser.save_pretrained(folder)
        return {"parameters": sum(p.numel() for p in denoiser.parameters()), **figures}


@dataclass(frozen=True)
class ExactDenoiser:
    """The ring's own posterior mean: a teacher without error."""

    needs = ()

    def ingredients(self) -> dict[str, Any]:
        return {"data": "ring"}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch

        from kdlm.diffusion import MixtureDenoiser
        from kdlm.sandbox.ring import SHARES, STD, centres

        MixtureDenoiser(centres(), STD, torch.tensor(SHARES)).save_pretrained(folder)
        return {}
