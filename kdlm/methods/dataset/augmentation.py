"""Augmentation through which gradients reach the images."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from kdlm.section import Section


class Augmentation(Section):
    """One random shift, turn and change of size, the same for all images of a call.

    Real and synthetic images go through the same draw (differentiable Siamese augmentation, arXiv 2102.08259, of which
    these are the geometric parts). By default nothing is changed.
    """

    shift: float = Field(0.0, ge=0, le=1)
    """Most that images are shifted by, along each axis, as a share of their side."""
    turn: float = Field(0.0, ge=0, le=180)
    """Most that they are turned by, in degrees."""
    size: float = Field(0.0, ge=0, lt=1)
    """Most that they grow or shrink by, as a share of their side."""

    def __call__(
        self, images: Float[Tensor, "n channels height width"], seed: int
    ) -> Float[Tensor, "n channels height width"]:
        """Return the images as the seed has them, with what comes in from outside as at the edge."""
        if not (self.shift or self.turn or self.size):
            return images
        across, down, turn, size = (torch.rand(4, generator=torch.Generator().manual_seed(seed)) * 2 - 1).tolist()
        angle, scale = torch.tensor(turn * self.turn).deg2rad(), 1 + size * self.size
        sine, cosine = (angle.sin() / scale).item(), (angle.cos() / scale).item()
        moved = [[cosine, -sine, 2 * across * self.shift], [sine, cosine, 2 * down * self.shift]]
        grid = affine_grid(images.new_tensor([moved]), [1, *images.shape[1:]], align_corners=False)
        return grid_sample(images, grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False)
