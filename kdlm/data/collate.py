"""Collation: sequences into the batch that methods, students and teachers read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from kdlm.data.tensor_rows import TensorRows
from kdlm.signal import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows with `input_ids` and `labels`.

    `padded`: `input_ids`, `labels` and `attention_mask` of shape [rows, longest], padded on the right.
    `padding_free`: all sequences in one row [1, tokens], with `position_ids` that restart at 0 with each sequence and
    no attention mask; rows that hold several packed sequences say so in `seq_lengths`. transformers keeps sequences
    apart by these position ids, and only in a forward without cache: call the model with `use_cache=False`.

    Labels are unshifted, and IGNORE_INDEX on the first token of every sequence and on padding. `index` and `domain`,
    where rows have them, are passed on: one number per sequence, in the order of the sequences; and so is `weight`, in
    float32. A row that is a preference holds two of them, chosen and rejected, which have its `index`; `rejected`
    [sequences] tells them apart.

    Attributes:
        pad_id: token id of padding, which no label and no attention ever refers to.
        pad_to_multiple_of: round the padded length up to a multiple of this.
    """

    pad_id: int
    layout: Literal["padded", "padding_free"] = "padded"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.layout == "padding_free" and self.pad_to_multiple_of:
            raise ValueError("pad_to_multiple_of means nothing without padding: leave it out, or use layout='padded'")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._padded(rows) if self.layout == "padded" else self._padding_free(rows)
        for name in ("index", "domain"):
            if name in rows[0]:
                batch[name] = torch.cat([_flat(row[name]).expand(len(lengths_in(row))) for row in rows])
        if "weight" in rows[0]:
            own = [_flat(row["weight"], np.float32).expand(len(lengths_in(row))) for row in rows]
            batch["weight"] = torch.cat(own)
        if "rejected" in rows[0]:
            batch["rejected"] = torch.cat([_flat(row["rejected"]) for row in rows]).bool()
        return batch

    def beside(self, values: Sequence[Any], batch: dict[str, Tensor], fill: int) -> Int[Tensor, "batch length"]:
        """Lay out numbers, one for each token of each row, as `batch` lays out its tokens; `fill` on padding."""
        if self.layout == "padding_free":
            return torch.cat([_flat(numbers) for numbers in values])[None]
        out = torch.full_like(batch["input_ids"], fill)
        for place, numbers in enumerate(values):
            out[place, : len(numbers)] = _flat(numbers)
        return out

    def _padded(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [side for row in rows for side in (_sides(row) if "rejected" in row else [row])]
        if any(len(lengths_in(row)) > 1 for row in rows):
            raise ValueError("packed rows cannot be padded apart: use Collator(layout='padding_free')")
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
        ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[number, :size] = _flat(row["input_ids"])
            labels[number, :size] = _flat(row["labels"])
            mask[number, :size] = 1
        labels[:, 0] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def _padding_free(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [length for row in rows for length in lengths_in(row)]
        positions = torch.cat([torch.arange(length) for length in lengths])
        labels = torch.cat([_flat(row["labels"]) for row in rows])
        return {
            "input_ids": torch.cat([_flat(row["input_ids"]) for row in rows])[None],
            "labels": labels.masked_fill(positions == 0, IGNORE_INDEX)[None],
            "position_ids": positions[None],
        }


def stacked(rows: Sequence[dict[str, Any]] | TensorRows) -> dict[str, Tensor]:
    """Make a batch of rows whose values all have one shape: images, their classes, their numbers."""
    if isinstance(rows, TensorRows):
        return rows.columns
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Prefetched:
    """Adds what a teacher says about a batch to the batch itself, under `teacher`.

    It runs where the batch is made: in the data loader's worker processes, or one batch ahead of the step in the main
    one. So reading a cache or waiting for a server overlaps with the student's work.

    Attributes:
        collate: makes the batch.
        prefetch: the teacher's: `batch -> anything that it finds again under batch["teacher"]`.
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    prefetch: Callable[[dict[str, Tensor]], Any]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        read = batch.get("theirs", batch)  # what the teacher reads, where that is another tokenization
        read["teacher"] = self.prefetch(read)
        return batch


def _flat(values: Any, dtype: Any = np.int64) -> Shaped[Tensor, "n"]:
    return torch.from_numpy(np.array(values, dtype=dtype).reshape(-1))  # a copy: Arrow memory is read-only


def lengths_in(row: dict[str, Any]) -> list[int]:
    """Return the lengths of the sequences in a row."""
    return [int(length) for length in row.get("seq_lengths", [len(row["input_ids"])])]


def _sides(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sequences of a preference as rows of their own."""
    stops = np.cumsum(lengths_in(row))[:-1]
    parts = (np.split(np.asarray(row[name]), stops) for name in ("input_ids", "labels"))
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*parts, strict=True)]
