"""Forms: the path of noise levels that a family of models walks, in its own time."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.diffusion.level import Level


@runtime_checkable
class Form(Protocol):
    """A path: time -> level, and back from any level on the same ray.

    `first` and `last` are the times of the least and the most noise.
    """

    first: float
    last: float

    def level(self, time: Float[Tensor, "batch"]) -> Level:
        """Return the level at a time of this family."""
        ...

    def time(self, level: Level) -> Float[Tensor, "batch"]:
        """Return the time at which this family has the same ratio of noise to signal."""
        ...


class VarianceExploding:
    """alpha = 1, and the time is sigma: EDM (Karras et al. 2022, arXiv 2206.00364)."""

    def __init__(self, first: float = 0.002, last: float = 80.0):
        self.first, self.last = first, last

    def level(self, time: Float[Tensor, "batch"]) -> Level:
        return Level(torch.ones_like(time), time)

    def time(self, level: Level) -> Float[Tensor, "batch"]:
        return level.ratio


class VariancePreserving:
    """alpha^2 + sigma^2 = 1 on a table of steps: DDPM (arXiv 2006.11239), Stable Diffusion.

    Args:
        alphas_cumprod: alpha^2 of each step, falling. Times between two steps, and levels between two rows, are
            interpolated linearly in the angle.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, "steps"]):
        alphas = alphas_cumprod.double()
        self.angles = torch.atan2((1 - alphas).sqrt(), alphas.sqrt())
        if not bool((self.angles.diff() > 0).all()):
            raise ValueError("alphas_cumprod must fall from step to step")
        self.first, self.last = 0.0, float(len(alphas) - 1)

    def level(self, time: Float[Tensor, "batch"]) -> Level:
        table = self.angles.to(time.device)
        below = time.detach().floor().clamp(0, self.last - 1).long()
        share = time.double() - below
        angle = (table[below] + share * (table[below + 1] - table[below])).to(time.dtype)
        return Level(angle.cos(), angle.sin())

    def time(self, level: Level) -> Float[Tensor, "batch"]:
        table, angle = self.angles.to(level.alpha.device), level.angle.double()
        above = torch.searchsorted(table, angle.detach().contiguous()).clamp(1, len(table) - 1)
        share = (angle - table[above - 1]) / (table[above] - table[above - 1])
        return (above - 1 + share).clamp(0, self.last).to(level.alpha.dtype)


class FlowMatching:
    """x_t = (1 - t) x_0 + t e: rectified flow (arXiv 2209.03003), Stable Diffusion 3, Flux."""

    def __init__(self, first: float = 0.0, last: float = 1.0):
        self.first, self.last = first, last

    def level(self, time: Float[Tensor, "batch"]) -> Level:
        return Level(1 - time, time)

    def time(self, level: Level) -> Float[Tensor, "batch"]:
        return level.sigma / (level.alpha + level.sigma)


class TrigFlow:
    """x_t = cos t x_0 + sin t z with z of the data's standard deviation (sCM, arXiv 2410.11081)."""

    def __init__(self, sigma_data: float = 1.0, first: float = 0.0, last: float = torch.pi / 2):
        self.sigma_data, self.first, self.last = sigma_data, first, last

    def level(self, time: Float[Tensor, "batch"]) -> Level:
        return Level(time.cos(), self.sigma_data * time.sin())

    def time(self, level: Level) -> Float[Tensor, "batch"]:
        return torch.atan2(level.sigma / self.sigma_data, level.alpha)
