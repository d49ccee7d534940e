"""Sequences: which sequence of a batch a token belongs to, for losses that average within each of them."""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from kdlm.methods.method import Batch
from kdlm.signal import IGNORE_INDEX, Rows, sequence_of, summed


def sampled_in(batch: Batch) -> Bool[Tensor, "batch length"]:
    """Return which tokens the student drew: none where the batch does not say."""
    return batch["sampled"].bool() if "sampled" in batch else torch.zeros_like(batch["labels"], dtype=torch.bool)


def over_sequences(values: Shaped[Tensor, "sequences"], batch: Batch) -> Shaped[Tensor, ""]:
    """Return the sum of a value of each sequence, by their weights where the batch has any."""
    return summed(values, batch.get("weight"))


def count_sequences(batch: Batch, of: Bool[Tensor, "batch length"] | None = None) -> Shaped[Tensor, ""]:
    """Return how many sequences have a token that is trained on (and in `of`), or the sum of their weights, without
    waiting for the device.
    """
    kept = batch["labels"][:, 1:] != IGNORE_INDEX
    if of is not None:
        kept = kept & of[:, 1:]
    numbers = sequence_of(batch)[:, 1:].masked_fill(~kept, 0)
    tokens = torch.zeros(batch["labels"].numel(), dtype=torch.long, device=kept.device)
    there = tokens.scatter_add_(0, numbers.flatten(), kept.flatten().long()) > 0
    return over_sequences(there[: len(batch["weight"])], batch) if "weight" in batch else there.sum()


def rows_of(values: Shaped[Tensor, "sequences"], batch: Batch, rows: Rows) -> Shaped[Tensor, "rows"]:
    """Return what is known of each sequence for each of the kept rows."""
    return values[rows.of_labels(sequence_of(batch))]


def group_rows(numbers: Int[Tensor, "rows"]) -> tuple[Int[Tensor, "rows"], Int[Tensor, "sequences"]]:
    """Return each row's sequence, counted from 0 over those that have rows, and how many rows each of them has."""
    _, group, lengths = numbers.unique(return_inverse=True, return_counts=True)
    return group, lengths


def lay_out(
    values: Shaped[Tensor, "rows"], group: Int[Tensor, "rows"], lengths: Int[Tensor, "sequences"], fill: float
) -> tuple[Shaped[Tensor, "sequences longest"], Int[Tensor, "rows"]]:
    """Return one line for each sequence, padded on the right with `fill`, and each row's place in its line.

    What is computed on a line depends on no other sequence, to the last bit. Rows of a sequence are in reading order.
    """
    count = torch.arange(len(group), device=group.device)
    first = count.new_full((len(lengths),), len(group)).scatter_reduce_(0, group, count, "amin")
    place = count - first[group]
    lines = values.new_full((len(lengths), int(lengths.max()) if len(lengths) else 0), fill)
    lines[group, place] = values
    return lines, place
