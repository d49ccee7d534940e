"""The step `select`: so many rows, of each prompt or of all."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field, model_validator

from kdlm.curation.ranking import Ranking
from kdlm.curation.step import Desk


class Select(Ranking):
    """Keeps so many rows, in the order that they have: at most four right answers of each prompt, or the half of all
    rows with the highest score.
    """

    name: Literal["select"] = "select"
    count: int | None = Field(None, ge=1)
    """How many rows; where there are fewer, all."""
    share: float | None = Field(None, gt=0, le=1)
    """Instead: which share of the rows, at least one."""
    of_each: str | None = None
    """Take so many of the rows of each value of this column, `prompt_id` for each prompt, instead of all rows."""
    balanced: str | None = None
    """Take the count evenly from the values of this column, such as `level`; what a value lacks the others give."""

    @model_validator(mode="after")
    def _says_how_many(self) -> "Select":
        if (self.count is None) == (self.share is None):
            raise ValueError("give count or share, and not both")
        if self.of_each is not None and self.balanced is not None:
            raise ValueError("give of_each or balanced, and not both: two steps do both")
        return self

    def compared(self) -> list[str]:
        return [column for column in (self.of_each, self.balanced) if column is not None]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        column = self.of_each or self.balanced
        groups: dict[Any, list[int]] = defaultdict(list)
        values = [None] * len(rows) if column is None else rows[column][:]
        for number in self.ranked(rows, desk):
            groups[repr(values[number])].append(number)
        if self.balanced is not None:
            chosen = list(_in_turn(groups))[: self._wanted(len(rows))]
        else:
            chosen = [number for group in groups.values() for number in group[: self._wanted(len(group))]]
        if column is not None:
            desk.counts.figures[f"values of {column}"] = len(groups)
        desk.counts.figures["not selected"] = len(rows) - len(chosen)
        return rows.select(sorted(chosen))

    def _wanted(self, size: int) -> int:
        return self.count if self.share is None else max(1, round(self.share * size))  # type: ignore[return-value]


def _in_turn(groups: dict[Any, list[int]]) -> Iterator[int]:
    """Yield the best row of each group, then the second of each, and so on."""
    for place in range(max(map(len, groups.values()), default=0)):
        for _, group in sorted(groups.items()):
            if place < len(group):
                yield group[place]
