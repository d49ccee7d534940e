"""Order: the rows of each epoch, the same on every rank, from the seed and the number of the epoch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler


class Order(Sampler[int]):
    """The rows of an epoch, asked for when it begins: a resumed run finds those that it was in the middle of.

    Every rank goes through the whole order; the loader gives each its own batches of it.

    Attributes:
        epoch: gives the number of epochs that are done.
    """

    epoch: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows(self.epoch()).tolist())

    def rows(self, epoch: int) -> Int[np.ndarray, "size"]:
        """Return the places of the rows of an epoch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep of it beside seed and step."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""


def permutation(size: int, *seed: int) -> Int[np.ndarray, "size"]:
    """Return the numbers below `size` in an order that the seed decides; no other draw of the run has a part in it."""
    return np.random.default_rng([part % 2**64 for part in seed]).permutation(size)


def column(rows: Any, name: str) -> np.ndarray:
    """Return a column of the training rows: one number for each.

    Raises ValueError where they have none of this name, or several values in a row.
    """
    first: Any = rows[0]
    if name not in first:
        raise ValueError(f"the training rows have no column {name!r}. They have: {', '.join(sorted(first))}")
    if hasattr(rows, "column_names"):
        values = np.asarray(rows[name][:])
    elif hasattr(rows, "columns"):
        values = np.asarray(rows.columns[name])
    else:
        values = np.asarray([row[name] for row in rows])
    if values.ndim != 1 or values.dtype == object:
        raise ValueError(f"column {name!r} of the training rows has several values in a row, expected one number")
    return values


def selected(rows: Any, places: Sequence[int] | np.ndarray) -> Any:
    """Return some of the rows, in this order."""
    return rows.select(list(places)) if hasattr(rows, "select") else [rows[int(place)] for place in places]
