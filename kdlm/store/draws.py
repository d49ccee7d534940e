"""Rows that hold different numbers of drawn tokens, in front of their rows and ascending."""

import numpy as np
import torch
from torch import Tensor

Record = dict[str, Tensor]


def counted(drawn: Tensor) -> Record:
    """Return the different ids of each row of sorted draws, in front and ascending, and how often each occurs."""
    rows, draws = drawn.shape
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros(rows, draws).scatter_add_(1, place, torch.ones(rows, draws))
    ids = torch.zeros_like(drawn).scatter_(1, place, drawn)
    width = max(1, int(place.max()) + 1) if drawn.numel() else 1
    return {"ids": ids[:, :width], "counts": counts[:, :width]}


def in_use(distinct: np.ndarray) -> np.ndarray:
    """Return, for so many ids in front of each row, which places hold one."""
    return np.arange(max(1, distinct.max(initial=0)))[None] < distinct[:, None]


def placed(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    placed = np.zeros(used.shape, np.int64)
    placed[used] = values
    return placed


def widened(records: list[Record], names: tuple[str, ...]) -> list[Record]:
    """Return the records with zeros behind these columns, as many as make them equally wide."""
    width = max(record[names[0]].shape[1] for record in records)
    pad = torch.nn.functional.pad
    return [{n: pad(x, (0, width - x.shape[1])) if n in names else x for n, x in r.items()} for r in records]
