"""The completion matches a pattern."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from kdlm.verifiers.verifier import LimitedSection, Verifier


class Regex(LimitedSection):
    """A regular expression of Python's `re`, from the recipe or from the data. Patterns can take exponential time."""

    name: Literal["regex"] = "regex"
    column: str | None = None
    """The column of the data that holds the pattern, where there is no `pattern`."""
    pattern: str | None = None
    """The pattern for every completion."""
    match: Literal["search", "fullmatch"] = "search"
    """`fullmatch`: the whole completion; `search`: some part of it."""
    ignore_case: bool = False
    """Take upper and lower case as the same."""

    @model_validator(mode="after")
    def _one_pattern(self) -> Self:
        if (self.pattern is None) == (self.column is None):
            raise ValueError("regex: give either `pattern`, or `column` with a pattern in every row")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"regex: pattern {self.pattern!r}: {error}") from error
        return self

    def verifier(self) -> Verifier:
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> bool:
        pattern = reference if self.pattern is None else self.pattern
        pattern = re.compile(pattern, re.IGNORECASE if self.ignore_case else 0)
        return getattr(pattern, self.match)(completion) is not None
