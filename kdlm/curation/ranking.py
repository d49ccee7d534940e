"""Ranking: which of several rows is kept, for the steps that keep some."""

from math import isnan, nan
from typing import Literal

from datasets import Dataset
from pydantic import model_validator

from kdlm.curation.filter import size_of
from kdlm.curation.step import Desk, Step, digest, lacks


class Ranking(Step):
    """A step that keeps some of several rows."""

    order: Literal["first", "highest", "lowest", "random"] = "first"
    """Which rows are kept: the first, those with the highest or lowest `by`, or random ones, drawn from the pipeline's
    seed and what a row holds: in whatever order rows come, the same are drawn."""
    by: str | None = None
    """The column that `highest` and `lowest` go by; a text or list counts by its length; null and nan come last."""

    @model_validator(mode="after")
    def _has_a_column(self) -> "Ranking":
        if (self.by is not None) != (self.order in ("highest", "lowest")):
            fault = "needs `by`, a column" if self.by is None else "goes by no column: remove `by`"
            raise ValueError(f"order: {self.order}: {fault}")
        return self

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, *([] if self.by is None else [self.by]), *self.compared(), by=self.describe())
        return before

    def compared(self) -> list[str]:
        """Return the columns that tell which rows belong together."""
        return []

    def ranked(self, rows: Dataset, desk: Desk) -> list[int]:
        """Return the numbers of the rows, those that are rather kept first."""
        numbers = list(range(len(rows)))
        if self.order == "random":
            drawn = [digest([desk.seed, repr(sorted(row.items()))]) for row in rows]
            return sorted(numbers, key=lambda number: drawn[number])
        if self.by is None:
            return numbers
        sign = -1 if self.order == "highest" else 1
        sizes = [nan if value is None else sign * size_of(value, self.by) for value in rows[self.by]]
        return sorted(numbers, key=lambda number: (isnan(sizes[number]), 0 if isnan(sizes[number]) else sizes[number]))
