"""Which noise levels a step trains at: one drawn for each sample."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion.forms import Form
from kdlm.diffusion.level import Level
from kdlm.section import Section


class LogNormal(Section):
    """The ratio of noise to signal is log-normal: EDM's training distribution (arXiv 2206.00364, table 1)."""

    name: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    """Mean of its logarithm."""
    std: float = Field(1.2, gt=0)
    """Standard deviation of its logarithm."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form) -> Level:
        """Turn a uniform number for each sample into its level."""
        ratio = (self.mean + self.std * torch.special.ndtri(uniform)).exp()
        return Level(torch.ones_like(ratio), ratio)


class Karras(Section):
    """The ratio lies between two ends, uniform in its 1 / rho-th power: EDM's sampling grid as a distribution."""

    name: Literal["karras"] = "karras"
    low: float = Field(0.002, gt=0)
    """Least ratio of noise to signal."""
    high: float = Field(80.0, gt=0)
    """Greatest ratio of noise to signal."""
    rho: float = Field(7.0, gt=0)
    """The greater, the more of the levels are low."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form) -> Level:
        """Turn a uniform number for each sample into its level."""
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        ratio = (low + uniform * (high - low)) ** self.rho
        return Level(torch.ones_like(ratio), ratio)


class UniformTime(Section):
    """The time is uniform over a part of the teacher's own range, as DMD draws it for Stable Diffusion."""

    name: Literal["uniform"] = "uniform"
    low: float = Field(0.02, ge=0, le=1)
    """Where the part begins, as a share of the range; 0 is the clean end."""
    high: float = Field(0.98, ge=0, le=1)
    """Where it ends."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form) -> Level:
        """Turn a uniform number for each sample into its level."""
        share = self.low + uniform * (self.high - self.low)
        return form.level(form.first + share * (form.last - form.first))


class LogitNormal(Section):
    """Flow matching's t is logit-normal: Stable Diffusion 3's training distribution (arXiv 2403.03206)."""

    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    """Mean of log(t / (1 - t)), which is the logarithm of the ratio of noise to signal."""
    std: float = Field(1.0, gt=0)
    """Its standard deviation."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form) -> Level:
        """Turn a uniform number for each sample into its level."""
        time = torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform))
        return Level(1 - time, time)


AnyTimes = Annotated[LogNormal | Karras | UniformTime | LogitNormal, Field(discriminator="name")]
"""A distribution of noise levels."""


def karras_ratios(steps: int, low: float, high: float, rho: float = 7.0) -> list[float]:
    """Return EDM's grid of `steps` ratios, falling from `high` to `low` (arXiv 2206.00364, eq. 5)."""
    if steps == 1:
        return [high]
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)]
