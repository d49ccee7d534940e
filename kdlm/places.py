"""Places: the fixed embeddings by which a masked autoencoder knows where a patch lies."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def sine_places(grid: int, width: int) -> Float[Tensor, "tokens width"]:
    """Return sines and cosines of the column and of the row, half of the width each; the class, first, has zeros.

    As of masked autoencoders (arXiv 2111.06377). `width` is a multiple of 4.
    """
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (column, row)]
    patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()


@torch.no_grad()
def embed_places(model: Any) -> Any:
    """Give a fresh ViTMAEForPreTraining its places, which transformers 5.23 leaves at 0; return the model."""
    for embedding in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        embedding.copy_(sine_places(math.isqrt(embedding.shape[1] - 1), embedding.shape[2])[None])
    return model
