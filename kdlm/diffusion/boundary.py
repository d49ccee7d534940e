"""The boundary of a consistency function: with no noise left, what comes out is what went in."""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion.level import Level, over
from kdlm.section import Section


class Boundary(Section):
    """Mixes x_t into a prediction of x_0 so that at the least noise it is x_t itself (LCM, arXiv 2310.04378).

    `c_skip x_t + c_out x_0` with `c_skip = s^2 / (k^2 + s^2)`, `c_out = k / sqrt(k^2 + s^2)` and k the scaled time
    since the form's first. For networks that predict noise or velocity; EDM's preconditioning has it nearly by itself.
    """

    sigma_data: float = Field(0.5, gt=0)
    """s, in the units of the scaled time."""
    scaling: float = Field(10.0, gt=0)
    """What the time of the network's own form is multiplied by: the greater, the sooner x_t is left out."""

    def __call__(
        self, denoiser: Any, noised: Float[Tensor, "batch *shape"], level: Level, clean: Tensor
    ) -> Float[Tensor, "batch *shape"]:
        """Return the consistency function where the denoiser predicts `clean`; exactly x_t at the form's first time."""
        form = denoiser.form
        k = self.scaling * (form.time(level) - form.first)
        total = k.square() + self.sigma_data**2
        mixed = over(self.sigma_data**2 / total, noised) * noised + over(k * total.rsqrt(), noised) * clean
        at_first = level.angle <= form.level(torch.full_like(level.alpha, form.first)).angle
        return torch.where(over(at_first, noised), noised.to(mixed.dtype), mixed)
