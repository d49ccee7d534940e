"""The step `filter`: rows that meet conditions on their columns."""

from typing import Any, Literal

from datasets import Dataset
from pydantic import Field, model_validator

from kdlm.curation.step import Desk, Step, lacks
from kdlm.section import Section

Value = str | int | float | bool


class Condition(Section):
    """What one column of a row has to hold. A null meets no condition, nor does nan a bound."""

    column: str
    """The column."""
    at_least: float | None = None
    """The smallest number, or the fewest characters of text."""
    at_most: float | None = None
    """The largest number, or the most characters of text."""
    one_of: list[Value] | None = None
    """The values that pass."""

    @model_validator(mode="after")
    def _says_something(self) -> "Condition":
        if self.at_least is None and self.at_most is None and self.one_of is None:
            raise ValueError("says nothing: give at_least, at_most or one_of")
        return self

    def met(self, row: Any) -> bool:
        """Tell whether a row meets it."""
        value = row[self.column]
        if value is None:
            return False
        if self.one_of is not None and value not in self.one_of:
            return False
        if self.at_least is None and self.at_most is None:
            return True
        size = size_of(value, self.column)
        return (self.at_least is None or size >= self.at_least) and (self.at_most is None or size <= self.at_most)


def size_of(value: Any, column: str) -> float:
    """Return a number, or the length of a text or list. Raises ValueError for anything else, naming the column."""
    if isinstance(value, str | list):
        return len(value)
    if not isinstance(value, int | float):
        raise ValueError(f"column {column!r}: {type(value).__name__} has no size: expected numbers, text or lists")
    return value


class Filter(Step):
    """Keeps the rows that meet every condition: with `verify` before it, rejection sampling."""

    name: Literal["filter"] = "filter"
    where: list[Condition] = Field(min_length=1)
    """[{column: score, at_least: 1}, {column: stop, one_of: [end]}]"""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, *(condition.column for condition in self.where), by="filter")
        return before

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        kept = []
        for number, row in enumerate(rows):
            failed = next((condition for condition in self.where if not condition.met(row)), None)
            if failed is None:
                kept.append(number)
            else:
                desk.counts.note(f"left out by {failed.column}", f"row {number}")
        return rows.select(kept)
