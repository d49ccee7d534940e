"""Tokens: which positions count, which token each predicts, and how a sum becomes a loss. Nothing else does this.

Labels come unshifted: `labels[b, t]` is the token at `t`, or IGNORE_INDEX when it is not trained on. The logits at
`t` predict the token at `t + 1`, so labels are shifted here and logits never are.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kdlm.signal import IGNORE_INDEX, Rows, summed, weights_of


def kept_rows(labels: Int[Tensor, "batch length"], weights: Float[Tensor, "batch length"] | None = None) -> Rows:
    """Return the positions whose next token is trained on, with that token and, by `weights_of`, its weight."""
    rows = rows_of(following(labels))
    return rows if weights is None else replace(rows, weights=rows.of_labels(weights))


def following(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Return the label of the token after each position, IGNORE_INDEX at the end.

    It is taken from whole sequences. In a part of one, cut out for a rank of its own, the label of what follows the
    part's last token is elsewhere.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def rows_of(shifted: Int[Tensor, "batch length"]) -> Rows:
    """Return the rows that labels shifted by `following` name, in whole sequences or in parts of them."""
    index = (shifted != IGNORE_INDEX).flatten().nonzero().squeeze(-1)
    return Rows(index, shifted.flatten().index_select(0, index))


def count_kept(
    labels: Int[Tensor, "batch length"], weights: Float[Tensor, "batch length"] | None = None
) -> Shaped[Tensor, ""]:
    """Return how many `kept_rows` there are, or the sum of their weights, without waiting for the device."""
    return summed(labels[:, 1:] != IGNORE_INDEX, None if weights is None else weights[:, 1:])


def real_rows(batch: dict[str, Tensor]) -> Rows:
    """Return every position that holds a token of a text, padding left out, with that token and its sequence's weight.

    What compares hidden states or attention, and not predictions, counts these.
    """
    ids, weights = batch["input_ids"], weights_of(batch)
    index = _real(batch).flatten().nonzero().squeeze(-1)
    rows = Rows(index, ids.flatten().index_select(0, index))
    return rows if weights is None else replace(rows, weights=weights.flatten().index_select(0, index))


def count_real(batch: dict[str, Tensor]) -> Shaped[Tensor, ""]:
    """Return how many `real_rows` there are, or the sum of their weights, without waiting for the device."""
    real, weights = _real(batch), weights_of(batch)
    return summed(real, weights)


def _real(batch: dict[str, Tensor]) -> Shaped[Tensor, "batch length"]:
    """Return whether each position holds a token: all do in a batch without padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def reduce(values: Float[Tensor, "rows"], num_items: Int[Tensor, ""] | int) -> Float[Tensor, ""]:
    """Return `sum(values) / num_items`: the one reduction.

    `num_items` counts the kept tokens of the whole optimiser step, over all ranks and micro-batches, so that the
    gradient does not depend on how the batch was cut. No rows give 0, with gradients that are 0.
    """
    least = num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
    return values.sum() / least
