"""Rows that are tensors of one shape and fit in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorRows:
    """Rows of tensors of equal length: what fits in memory, indexed like a data set."""

    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> "TensorRows":
        return self.select(indices)  # what torch's loader asks for a batch: one look-up for all of its rows

    def select(self, indices: Sequence[int]) -> "TensorRows":
        """Return some of the rows."""
        at = torch.tensor(list(indices), dtype=torch.int64)
        return TensorRows({name: column[at] for name, column in self.columns.items()})
