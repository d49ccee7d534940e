"""A ring of eight Gaussians in the plane, of unlike shares: data whose denoiser is known exactly."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

RADIUS, STD = 2.0, 0.15
SHARES = (0.2, 0.05, 0.125, 0.125, 0.2, 0.05, 0.125, 0.125)


def centres() -> Float[Tensor, "modes 2"]:
    """Return where the components lie."""
    angles = torch.arange(len(SHARES)) * (2 * math.pi / len(SHARES))
    return RADIUS * torch.stack([angles.cos(), angles.sin()], -1)


def ring(count: int, *, seed: int = 0) -> Float[Tensor, "count 2"]:
    """Return points of the mixture."""
    generator = torch.Generator().manual_seed(seed)
    modes = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=generator)
    return centres()[modes] + STD * torch.randn(count, 2, generator=generator)
