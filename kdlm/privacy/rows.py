"""Which rows a private step takes: each of them with the same probability, whatever the others do."""

from collections.abc import Callable, Collection, Iterator
from math import ceil
from typing import Any

import torch
from torch.utils.data import Sampler

from kdlm.rollouts import Written


class PoissonBatches(Sampler[list[int]]):
    """The micro-batches of one pass over the data: each step's rows are drawn at once, and cut into `parts`.

    Args:
        rows, rate: how many there are, and the probability of each to be in a step.
        steps: in a pass.
        parts: micro-batches in a step, some of which may be empty.
        first: gives the number of steps done when a pass begins, or when one is gone on with.
        seed: step -> seed of its rows.
    """

    def __init__(
        self,
        rows: int,
        rate: float,
        *,
        steps: int,
        parts: int,
        first: Callable[[], int],
        seed: Callable[[int], int],
    ):
        self.rows, self.rate, self.steps, self.parts = rows, rate, steps, parts
        self.first, self.seed = first, seed

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        begin = self.first() // self.steps * self.steps
        for step in range(begin, begin + self.steps):
            chance = torch.Generator().manual_seed(self.seed(step))
            sampler = UniformWithReplacementSampler(
                num_samples=self.rows, sample_rate=self.rate, generator=chance, steps=1
            )
            (taken,) = sampler
            size = ceil(len(taken) / self.parts)
            for part in range(self.parts):
                yield taken[part * size : (part + 1) * size]


def lacked_room(one: Written, most: int, ends: Collection[int]) -> bool:
    """Whether the last turn of a completion was cut before it had the `most` tokens that it was allowed."""
    ids, turns = one.completion.ids, one.turn_of
    if one.completion.stop != "length" or (ids and ids[-1] in ends):  # an episode without room for one more turn
        return False
    return not ids or turns.count(turns[-1]) < most


def row_count(rows: Any) -> int:
    """Return the number of training rows. Raises ValueError where it is not known, or a row is there twice."""
    if not hasattr(rows, "__len__"):
        raise ValueError("data.streaming: the sampling rate needs the number of rows: use streaming: false")
    if "index" in (getattr(rows, "column_names", None) or ()):
        if len(rows.with_format("arrow")["index"][:].unique()) < len(rows):
            raise ValueError("data.train: a row is there more than once, and so in several units")
    return len(rows)
