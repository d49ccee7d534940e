"""Solver: the levels at which a teacher's probability flow is followed, and how."""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion.forms import Form
from kdlm.diffusion.level import Level, over
from kdlm.diffusion.sampling import Step, follow
from kdlm.diffusion.times import Karras, UniformTime
from kdlm.section import Section

AnyGrid = Annotated[Karras | UniformTime, Field(discriminator="name")]
"""A distribution of noise levels whose quantiles are a grid."""


class Solver(Section):
    """How a probability flow is followed from noise to a sample."""

    steps: int = Field(16, ge=1)
    """How many; one to the clean sample among them."""
    grid: AnyGrid = Karras()
    """Levels: these quantiles of a distribution, from the most noise to the least. Of `karras` they are EDM's grid."""
    second_order: bool = True
    """Heun's steps, each with two evaluations but the last; else Euler's, which are DDIM's."""

    def levels(self, form: Form, noise: Tensor) -> list[Level]:
        """Return the levels, falling, for each sample of `noise`."""
        return grid_levels(self.grid, self.steps, form, noise)

    def __call__(self, predict: Step, noise: Float[Tensor, "batch *shape"], form: Form) -> Tensor:
        """Return the samples that standard normal noise leads to; `form` is the denoiser's own."""
        levels = self.levels(form, noise)
        return follow(predict, over(levels[0].scale, noise) * noise, levels, second_order=self.second_order)


def grid_levels(grid: AnyGrid, steps: int, form: Form, like: Tensor) -> list[Level]:
    """Return `steps` levels, falling from the grid's last quantile to its first, for a batch as long as `like`.

    They are computed in float64 and given in the type of `like`, so that grids of 2^k steps share their levels.
    """
    levels = grid.draw(torch.linspace(1, 0, steps, dtype=torch.float64), form)
    alphas, sigmas = levels.alpha.to(like), levels.sigma.to(like)
    return [Level(alphas[i].expand(len(like)), sigmas[i].expand(len(like))) for i in range(steps)]
