"""Packing: whole sequences into rows of at most `size` tokens, by best-fit decreasing (arXiv 2404.10830).

No sequence is cut and none is lost. trl.pack_dataset bins in the same way, but cuts what is too long and asks that
every column be as long as the sequence, which the number of a sequence is not; and TRL is not needed to run kdlm.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kdlm.data.alignment import numbered_on


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return bins of positions in `lengths`, such that no bin holds more than `size`.

    Each length, longest first, goes to the fullest bin that still has room for it.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # room left -> bins
    rooms: list[int] = []  # the rooms that some bin has, ascending
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        if length > size:
            raise ValueError(f"a sequence of {length} tokens does not fit a packed row of {size}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, number = size, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        bins[number].append(position)
        if room > length:
            if not by_room[room - length]:
                insort(rooms, room - length)
            by_room[room - length].append(number)
    return bins


def packed_row(sequences: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return sequences as one row, `seq_lengths` telling them apart; domains and weights are lists, where there are
    any.
    """
    rows = list(sequences)
    paired = _second_reading(rows) if rows and "chunks" in rows[0] else {}
    domains = {"domain": [int(row["domain"]) for row in rows]} if rows and "domain" in rows[0] else {}
    weights = {"weight": [float(row["weight"]) for row in rows]} if rows and "weight" in rows[0] else {}
    return {
        "input_ids": np.concatenate([row["input_ids"] for row in rows]),
        "labels": np.concatenate([row["labels"] for row in rows]),
        "seq_lengths": [len(row["input_ids"]) for row in rows],
        "index": [int(row["index"]) for row in rows],
        "length": sum(len(row["input_ids"]) for row in rows),
        **domains,
        **weights,
        **paired,
    }


def _second_reading(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what rows of two readings have of the teacher's, their chunks numbered over all of them."""
    names = ("chunks", "their_chunks")
    sides = numbered_on(*([row[name] for row in rows] for name in names))
    numbered = {name: np.concatenate(side) for name, side in zip(names, sides, strict=True)}
    theirs = {name: np.concatenate([row[name] for row in rows]) for name in ("their_ids", "their_labels")}
    return {**numbered, **theirs, "their_lengths": [len(row["their_ids"]) for row in rows]}
