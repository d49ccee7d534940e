"""Subsets: a fresh part of the rows each epoch (RS2, arXiv 2305.18424), or one for the run (arXiv 2403.07854)."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field

from kdlm.samplers.order import Order, column, permutation
from kdlm.section import Section


class RepeatedSubsets(Section):
    """A fresh random part of the rows for every epoch (RS2, arXiv 2305.18424): the baseline of every choice of rows."""

    name: Literal["repeated"] = "repeated"
    fraction: float = Field(gt=0, le=1)
    """Share of the rows that an epoch has. `training.num_train_epochs` counts such epochs, and the learning rate's
    schedule spans their updates."""
    replacement: bool = False
    """Draw each epoch's rows from all of them. Without, a permutation is walked through in consecutive parts and drawn
    anew when it is used up, so that no row comes again before every other has come."""

    def order(self, rows: Any, seed: int) -> "RepeatedOrder":
        """Return the order of these rows."""
        return RepeatedOrder(len(rows), self.fraction, seed, replacement=self.replacement)


class RepeatedOrder(Order):
    """The i-th row of a run without replacement is that at `i mod n` of the permutation number `i div n`."""

    def __init__(self, count: int, fraction: float, seed: int, *, replacement: bool = False):
        super().__init__(max(1, round(fraction * count)))
        self.count, self.seed, self.replacement = count, seed, replacement

    def rows(self, epoch: int) -> Int[np.ndarray, "size"]:
        if self.replacement:
            return permutation(self.count, self.seed, epoch)[: self.size]
        begin, end = epoch * self.size, (epoch + 1) * self.size
        first, last = begin // self.count, (end - 1) // self.count
        walked = np.concatenate([permutation(self.count, self.seed, number) for number in range(first, last + 1)])
        return walked[begin - first * self.count : end - first * self.count]


class FixedSubset(Section):
    """One part of the rows for the whole run, drawn at random or by a score (data pruning, arXiv 2403.07854).

    With knowledge distillation a random part rivals scored ones. An epoch is once through the part: the number of
    updates is kept where `training.max_steps` says it, and falls with the part where `num_train_epochs` does.
    """

    name: Literal["fixed"] = "fixed"
    fraction: float = Field(gt=0, le=1)
    """Share of the rows that is kept."""
    by: str | None = None
    """Column of the training rows that scores them: of text `score`, to which a source maps one of its own. At random
    without it."""
    keep: Literal["highest", "lowest"] = "highest"
    """Which end of the scores is kept."""
    balance: str | None = None
    """Column whose values keep their shares: `domain` of text, `labels` of images."""
    tie: float | None = Field(None, ge=0, le=1)
    """Tie the losses to the fraction f: those that read the teacher are multiplied by a = 1 - tie * f, the others by
    1 - a. The paper takes a near 1 for a small part and less for a large one; the line between is ours."""
    seed: int = 0
    """Which rows are kept. Not the run's seed, so that runs of different seeds share them."""

    def order(self, rows: Any, seed: int) -> "FixedOrder":
        """Return the order of these rows. Raises ValueError, naming the key, where they lack a column."""
        return FixedOrder(self.kept(rows), seed)

    def kept(self, rows: Any) -> Int[np.ndarray, "kept"]:
        """Return the places of the rows that are kept, rising."""
        rank = permutation(len(rows), self.seed)  # of equal scores those are kept that come first in it
        if self.by is not None:
            scores = self._column("by", rows)[rank]
            if not np.isfinite(scores).all():
                raise ValueError(f"sampler.by: {self.by} is not a finite number in every row")
            rank = rank[np.argsort(-scores if self.keep == "highest" else scores, kind="stable")]
        if self.balance is None:
            return np.sort(rank[: max(1, round(self.fraction * len(rows)))])
        groups = self._column("balance", rows)[rank]
        parts = [rank[groups == group] for group in np.unique(groups)]
        return np.sort(np.concatenate([part[: max(1, round(self.fraction * len(part)))] for part in parts]))

    def _column(self, key: str, rows: Any) -> np.ndarray:
        try:
            return column(rows, getattr(self, key))
        except ValueError as error:
            raise ValueError(f"sampler.{key}: {error}") from error


class FixedOrder(Order):
    """The kept rows, shuffled anew every epoch."""

    def __init__(self, kept: Int[np.ndarray, "kept"], seed: int):
        super().__init__(len(kept))
        self.kept, self.seed = kept, seed

    def rows(self, epoch: int) -> Int[np.ndarray, "size"]:
        return self.kept[permutation(self.size, self.seed, epoch)]


def tied(losses: Sequence[Any], sampler: Any) -> list[Any]:
    """Return the losses with the weights that a sampler ties to its fraction; as they are where it ties none.

    Raises ValueError where there are not losses of both kinds, or one has a schedule for a weight.
    """
    tie = getattr(sampler, "tie", None)
    if tie is None:
        return list(losses)
    told = [getattr(loss, "needs_teacher", True) for loss in losses]
    if len(set(told)) < 2:
        raise ValueError("sampler.tie: it weighs losses of a teacher against losses of labels: give one of each")
    if scheduled := [loss.name for loss in losses if not isinstance(loss.weight, int | float)]:
        raise ValueError(f"sampler.tie: the weight of {scheduled[0]} is a schedule, expected a number")
    share = 1 - tie * sampler.fraction
    return [
        loss.model_copy(update={"weight": loss.weight * (share if by_teacher else 1 - share)})
        for loss, by_teacher in zip(losses, told, strict=True)
    ]
