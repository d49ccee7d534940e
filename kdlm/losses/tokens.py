"""Tokens: which positions count, which token each predicts, and how a sum becomes a loss. Nothing else does this.

Labels come unshifted: `labels[b, t]` is the token at `t`, or IGNORE_INDEX when it is not trained on. The logits at
`t` predict the token at `t + 1`, so labels are shifted here and logits never are.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.signal import IGNORE_INDEX, Rows


def kept_rows(labels: Int[Tensor, "batch length"]) -> Rows:
    """Return the positions whose next token is trained on, with that token."""
    following = torch.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    index = (following != IGNORE_INDEX).flatten().nonzero().squeeze(-1)
    return Rows(index, following.flatten().index_select(0, index))


def count_kept(labels: Int[Tensor, "batch length"]) -> Int[Tensor, ""]:
    """Return `len(kept_rows(labels))` as a tensor, without waiting for the device."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def reduce(values: Float[Tensor, "rows"], num_items: Int[Tensor, ""] | int) -> Float[Tensor, ""]:
    """Return `sum(values) / num_items`: the one reduction.

    `num_items` counts the kept tokens of the whole optimiser step, over all ranks and micro-batches, so that the
    gradient does not depend on how the batch was cut. No rows give 0, with gradients that are 0.
    """
    least = num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
    return values.sum() / least
