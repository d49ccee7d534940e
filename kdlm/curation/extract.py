"""The step `extract`: parts of a text, found by a regular expression or as its final answer, into columns."""

import re
from collections import deque
from typing import Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field, field_validator, model_validator

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.sandbox.tasks import marked_answer


class Extract(Step):
    """Takes parts of a text into columns. A row in whose text they are not found is left out and counted."""

    name: Literal["extract"] = "extract"
    column: str = "completion"
    """The column whose text is looked through."""
    pattern: str | None = Field(None, min_length=1)
    """A regular expression of Python's `re`, where `.` is a line end too: its named groups are the columns
    (`<think>(?P<thoughts>.*?)</think>`). Null takes the final answer, as verifiers read it: after the last `Answer:` or
    `####`, or in the last `\\boxed{}`."""
    into: str | None = None
    """The column that takes the answer, or the whole match of a pattern without named groups."""
    which: Literal["first", "last"] = "first"
    """Which match of several."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _goes_somewhere(self) -> "Extract":
        named = bool(self.pattern and re.compile(self.pattern).groupindex)
        if named == (self.into is not None):
            raise ValueError(
                "into: remove it, the pattern's groups name the columns"
                if named
                else "into: missing: say it, or name the pattern's groups (?P<column>...)"
            )
        return self

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.column, by="extract")
        return list(dict.fromkeys([*before, *self._names()]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        found = [self._parts(text) if isinstance(text, str) else {} for text in rows[self.column]]
        kept = [number for number, parts in enumerate(found) if parts]
        for number in (number for number, parts in enumerate(found) if not parts):
            desk.counts.note(f"not found in {self.column}", f"row {number}")
        columns = {name: pa.array([found[number][name] for number in kept], pa.string()) for name in self._names()}
        return with_columns(rows.select(kept), columns)

    def _names(self) -> list[str]:
        return [self.into] if self.into is not None else list(re.compile(self.pattern or "").groupindex)

    def _parts(self, text: str) -> dict[str, str | None]:
        if self.pattern is None:
            answer = marked_answer(text)
            return {} if answer is None else {str(self.into): answer}
        matches = re.finditer(self.pattern, text, re.DOTALL)
        match = next(matches, None) if self.which == "first" else next(iter(deque(matches, maxlen=1)), None)
        if match is None:
            return {}
        return {self.into: match[0]} if self.into is not None else {**match.groupdict()}
