"""Which two noise levels a discrete consistency model compares: one drawn, and one nearer to the data."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import AnyTimes, Form, Level, LogNormal, karras_ratios
from kdlm.section import Section

Pair = tuple[Level, Level]
"""The noisier level and the nearer one, of each sample."""


class KarrasGrid(Section):
    """Two neighbours of EDM's sampling grid, each pair as likely (arXiv 2303.01469, section 3)."""

    name: Literal["karras"] = "karras"
    steps: int = Field(18, ge=2)
    """Levels of the grid."""
    low: float = Field(0.002, gt=0)
    """Least ratio of noise to signal."""
    high: float = Field(80.0, gt=0)
    """Greatest ratio of noise to signal."""
    rho: float = Field(7.0, gt=0)
    """The greater, the more of the levels are low."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form, progress: float) -> Pair:
        """Turn a uniform number for each sample into its two levels."""
        grid = torch.tensor(karras_ratios(self.steps, self.low, self.high, self.rho), device=uniform.device)
        place = (uniform * (self.steps - 1)).long().clamp(max=self.steps - 2)
        return _exploding(grid[place]), _exploding(grid[place + 1])


class TimeGrid(Section):
    """Two neighbours of a grid that is even in the student's own time: DDIM's steps (LCM, arXiv 2310.04378).

    50 steps of a table of 1,000 are LCM's skip of 20.
    """

    name: Literal["time"] = "time"
    steps: int = Field(50, ge=1)
    """Intervals of the grid, from the last time to the first."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form, progress: float) -> Pair:
        """Turn a uniform number for each sample into its two levels."""
        place = (uniform * self.steps).floor().clamp(max=self.steps - 1)
        span = (form.last - form.first) / self.steps
        return form.level(form.first + (place + 1) * span), form.level(form.first + place * span)


class ShrinkingGap(Section):
    """A drawn level and a share of it that grows to 1 by stages of the run: easy consistency tuning, ECT.

    `r = t (1 - n(t) / base^stage)` with `n(t) = 1 + 8 sigmoid(-t)` and t the ratio of noise to signal; at first r is
    near 0, which is plain denoising (arXiv 2406.14548, section 3).
    """

    name: Literal["shrinking"] = "shrinking"
    times: AnyTimes = LogNormal(mean=-1.1, std=2.0)
    """Distribution of the noisier level."""
    base: float = Field(2.0, gt=1)
    """What the gap is divided by at each stage."""
    stages: int = Field(8, ge=1)
    """Stages of the run, equally long; the first begins with the gap divided once."""
    low: float = Field(0.002, gt=0)
    """Least ratio of noise to signal of either level."""

    def draw(self, uniform: Float[Tensor, "batch"], form: Form, progress: float) -> Pair:
        """Turn a uniform number for each sample into its two levels."""
        stage = 1 + min(int(progress * self.stages), self.stages - 1)
        # A level below the least would have no gap at all.
        ratio = self.times.draw(uniform, form).ratio.clamp(min=2 * self.low)
        share = 1 - (1 + 8 * torch.sigmoid(-ratio)) / self.base**stage
        return _exploding(ratio), _exploding((ratio * share).clamp(min=self.low))


AnyPairs = Annotated[KarrasGrid | TimeGrid | ShrinkingGap, Field(discriminator="name")]
"""A distribution of two noise levels."""


def _exploding(ratio: Tensor) -> Level:
    return Level(torch.ones_like(ratio), ratio)
