"""Gaussian data: the denoiser and the consistency map are known, in any form."""

import torch
from torch import Tensor, nn

from kdlm.diffusion import Denoiser, Form, Level, MixtureDenoiser, VarianceExploding, over
from kdlm.diffusion.denoiser import Prediction

MEAN, STD = 0.3, 0.5


def teacher(width: int = 4) -> MixtureDenoiser:
    """The posterior mean of x_0 where x_0 ~ N(MEAN, STD^2)."""
    centres = torch.full((1, width), MEAN, dtype=torch.float64)
    return MixtureDenoiser(centres, STD, torch.ones(1, dtype=torch.float64)).requires_grad_(False)


class ConsistencyMap(Denoiser):
    """Where the probability flow ends: `m + s (y - m) / sqrt(s^2 + r^2)` with y = x_t / alpha; plus an offset to learn.

    Its form and what its network puts out are free, as they are of any student.
    """

    def __init__(self, form: Form | None = None, prediction: Prediction = "sample", width: int = 4):
        super().__init__()
        self.form, self.prediction, self.shape = form or VarianceExploding(), prediction, (width,)
        self.offset = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def predict(self, noised: Tensor, time: Tensor, condition: object, guidance: object) -> Tensor:
        level = self.form.level(time)
        y, total = noised / over(level.alpha, noised), STD**2 + over(level.ratio, noised).square()
        clean = MEAN + STD * (y - MEAN) * total.rsqrt() + self.offset
        noise = level.noise_in(noised, clean)
        alpha, sigma = over(level.alpha, noised), over(level.sigma, noised)
        match self.prediction:
            case "sample":
                return clean
            case "epsilon":
                return noise
            case "v_prediction":
                return alpha * noise - sigma * clean
            case "flow":
                return noise - clean


def batch(count: int = 16, width: int = 4) -> dict[str, Tensor]:
    """Rows of the data."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {"samples": MEAN + STD * noise, "index": torch.arange(count)}


def constant(ratio: float, count: int) -> Level:
    """One ratio of noise to signal for all."""
    return Level(torch.ones(count, dtype=torch.float64), torch.full((count,), ratio, dtype=torch.float64))
