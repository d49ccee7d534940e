"""The step `fall_back`: a rewrite where it passed, and else the original."""

from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.filter import Condition
from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks


class FallBack(Step):
    """Puts a rewrite in the place of what it rewrites, where it meets the conditions; adds `taken`.

    So self-data distillation (arXiv 2410.09982) makes its targets: the unpruned model rewrites each, and where the
    rewrite's answer is another, the given target stays. `taken` says which it was: `rewrite` or `original`.
    """

    name: Literal["fall_back"] = "fall_back"
    rewrite: str = "rewritten"
    """The column of rewrites; it leaves."""
    onto: str = "completion"
    """The column of originals, which takes what is kept."""
    where: list[Condition] = Field(min_length=1)
    """What a rewrite has to meet: [{column: score, at_least: 1}]."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.rewrite, self.onto, *(condition.column for condition in self.where), by="fall_back")
        return [*(name for name in before if name not in (self.rewrite, "taken")), "taken"]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        names = self.leaves(rows.column_names)
        kept, taken = [], []
        for number, row in enumerate(rows):
            values: Any = row
            passed = bool(values[self.rewrite]) and all(condition.met(values) for condition in self.where)
            kept.append(values[self.rewrite] if passed else values[self.onto])
            taken.append("rewrite" if passed else "original")
            if not passed:
                desk.counts.note("the original kept", f"row {number}")
        own = {self.onto: pa.array(kept, pa.string()), "taken": pa.array(taken, pa.string())}
        return with_columns(rows, own).select_columns(names)
