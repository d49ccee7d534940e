"""Mixing and splitting: which sequences of which source, in which order, on which side."""

import hashlib
from collections.abc import Callable, Iterator
from heapq import heapify, heapreplace
from itertools import chain
from typing import Literal, TypeVar

import numpy as np

T = TypeVar("T")

END = object()


def mixed(
    sources: list[Callable[[], Iterator[T]]],
    weights: list[float] | None,
    stopping_strategy: Literal["first_exhausted", "all_exhausted"],
) -> Iterator[T]:
    """Iterate over several sources; each call of a source starts it anew.

    Without weights one follows the other. With weights, the i-th item of a source is due at time (i + 1/2) / weight,
    and items come in the order of their times: no chance in it, and after any number of items each source has had
    its share of them, to within one or two items.
    """
    if weights is None:
        yield from chain.from_iterable(source() for source in sources)
        return
    running = [source() for source in sources]
    taken = [0] * len(sources)
    exhausted: set[int] = set()
    due = [(0.5 / weight, number) for number, weight in enumerate(weights)]
    heapify(due)
    while True:
        number = due[0][1]
        item = next(running[number], END)
        if item is END:
            exhausted.add(number)
            if stopping_strategy == "first_exhausted" or len(exhausted) == len(sources):
                return
            running[number] = sources[number]()
            item = next(running[number])
        taken[number] += 1
        heapreplace(due, ((taken[number] + 0.5) / weights[number], number))
        yield item  # type: ignore[misc]  END is not an item


def held_out(keys: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return which sequences are held out: those of `count` distinct rows.

    `keys` has the content hash of the row that each sequence comes from. The choice depends on content and seed
    alone: the order of the rows does not matter, identical rows and the pieces of one row stay together.
    """
    rows = np.unique(keys)
    if count >= len(rows):
        raise ValueError(f"holding out {count} of {len(rows)} distinct rows for evaluation leaves none to train on")
    ranked = sorted(rows.tolist(), key=lambda key: hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest())
    return np.isin(keys, ranked[:count])
