"""Regrouping: the sequences of several batches, read so many at a time as a teacher likes best.

What a teacher reads of a batch is its model's inputs, and where the rows are that are asked about. Sequences that lie
end to end, without padding, are joined as they are; padded ones are padded to the longest of those that are read at
once. So answers differ by no more than the rounding of products of other shapes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Inputs = dict[str, Tensor]

OF_TOKENS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
"""The inputs that can be regrouped: they have one value for each token."""


@dataclass(frozen=True)
class Reading:
    """What a teacher reads at once.

    Attributes:
        inputs: of the model, `[batch, length]` each.
        index: positions that are asked about, in the flattened batch; they ascend.
    """

    inputs: Inputs
    index: Int[Tensor, "rows"]

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self._starts) if self._flat else len(self.inputs["input_ids"])

    @property
    def _flat(self) -> bool:
        return "position_ids" in self.inputs and "attention_mask" not in self.inputs

    @property
    def _starts(self) -> Int[Tensor, "sequences"]:
        """Where each sequence begins in the flattened batch."""
        ids = self.inputs["input_ids"]
        if self._flat:
            return (self.inputs["position_ids"].flatten() == 0).nonzero().squeeze(-1)
        return torch.arange(len(ids), device=ids.device) * ids.shape[1]

    def parts(self, size: int) -> Iterator["Reading"]:
        """Yield the sequences `size` at a time; of padded ones no more columns than the longest has."""
        total, starts = self.inputs["input_ids"].numel(), self._starts.tolist()
        edges = [*starts[::size], total]
        for number, (begin, end) in enumerate(pairwise(edges)):
            own = self.index[(self.index >= begin) & (self.index < end)] - begin
            if self._flat:
                yield Reading({key: value.flatten()[begin:end][None] for key, value in self.inputs.items()}, own)
            else:
                rows = slice(number * size, (number + 1) * size)
                yield Reading({key: value[rows] for key, value in self.inputs.items()}, own)._trimmed()

    def _trimmed(self) -> "Reading":
        mask = self.inputs.get("attention_mask")
        length = self.inputs["input_ids"].shape[1]
        if mask is None:
            return self
        read = mask.any(0)
        read[self.index % length] = True  # whoever asks about padding gets an answer too
        longest = int(read.nonzero().max()) + 1
        return self if longest == length else self._of_length(longest)

    def _of_length(self, length: int) -> "Reading":
        """Cut padding off, or pad: with zeros, which attention does not see."""
        old = self.inputs["input_ids"].shape[1]
        inputs = {key: _sized(value, length) for key, value in self.inputs.items()}
        return Reading(inputs, self.index // old * length + self.index % old)

    def masked(self) -> "Reading":
        """Return it with a mask, which is ones where there was none."""
        if self._flat or "attention_mask" in self.inputs:
            return self
        return replace(self, inputs=self.inputs | {"attention_mask": torch.ones_like(self.inputs["input_ids"])})


def regrouped(readings: Sequence[Reading], size: int) -> list[Reading]:
    """Return the same sequences in the same order, `size` of them in each reading.

    Raises ValueError for inputs that are not of single tokens (images), and batches of different kinds.
    """
    if other := sorted({key for one in readings for key in one.inputs} - OF_TOKENS):
        raise ValueError(f"teacher.batch_size: {other[0]} cannot be regrouped by sequences: leave batch_size out")
    if len({one.inputs["input_ids"].shape[1] for one in readings}) > 1:
        readings = [one.masked() for one in readings]
    if len({frozenset(one.inputs) for one in readings}) > 1:
        raise ValueError("teacher.batch_size: some micro-batches are padded and others are not: leave batch_size out")
    return list(_joined(readings).parts(size))


def split(
    inputs: Inputs, asked: Sequence[Int[Tensor, "rows"]], size: int
) -> list[tuple[Inputs, list[Int[Tensor, "some"]]]]:
    """Return a batch's sequences, `size` in each reading, and where in it the positions of each list in `asked` are.

    Args:
        asked: positions in the flattened batch, each list ascending: read part by part it is read in order.
    """
    index, found, done = torch.cat(list(asked)).unique(), [], 0
    for part in regrouped([Reading(inputs, index)], size):
        here, done = index[done : done + len(part.index)], done + len(part.index)
        places = [part.index[torch.searchsorted(here, one[torch.isin(one, here)])] for one in asked]
        found.append((part.inputs, places))
    return found


def _joined(readings: Sequence[Reading]) -> Reading:
    flat, keys = readings[0]._flat, readings[0].inputs
    if flat:
        inputs = {key: torch.cat([one.inputs[key].flatten() for one in readings])[None] for key in keys}
    else:
        longest = max(one.inputs["input_ids"].shape[1] for one in readings)
        readings = [one._of_length(longest) for one in readings]
        inputs = {key: torch.cat([one.inputs[key] for one in readings]) for key in keys}
    before = accumulate((one.inputs["input_ids"].numel() for one in readings), initial=0)
    return Reading(inputs, torch.cat([one.index + start for one, start in zip(readings, before, strict=False)]))


def dealt(parts: Sequence[Shaped[Tensor, "n *rest"]], counts: Sequence[int]) -> list[Shaped[Tensor, "m *rest"]]:
    """Return the same rows in the same order, so many in each tensor: views, and copies where parts are joined."""
    found, left, nothing = [], list(parts), parts[0][:0]
    for count in counts:
        taken = []
        while count:
            taken.append(left[0][:count])
            count -= len(taken[-1])
            left[0] = left[0][len(taken[-1]) :]
            if not len(left[0]):
                left.pop(0)
        found.append(torch.cat(taken) if len(taken) > 1 else (taken or [nothing])[0])
    return found


def _sized(value: Int[Tensor, "batch length"], length: int) -> Int[Tensor, "batch length"]:
    return torch.nn.functional.pad(value, (0, length - value.shape[1]))
