"""The step `screen`: rows with a pattern that an audit found, or with what is personal or secret, leave."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.audit import Row, flagged, patterns_in
from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.curation.words import texts_of
from kdlm.disk import digest_of_file


class Screen(Step):
    """Leaves out rows that should not be trained on: with a pattern that `kdlm audit` found in the answers of a writer,
    or with addresses, numbers of people and accounts, or keys, in prompt or completion.
    """

    name: Literal["screen"] = "screen"
    patterns: Path | None = None
    """What an audit wrote: `audit.json`. Null looks for what is personal or secret alone."""
    region: str | None = Field(None, pattern="^[A-Z]{2}$")
    """A country whose phone numbers are found in their national form too: DE."""
    column: str = "completion"
    """The column that holds the answer."""
    mark: str | None = None
    """Leave no row out, and write the reasons into this column; null where there are none."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "content": self.patterns and digest_of_file(self.patterns)}

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.column, by="screen")
        self._found()
        return before if self.mark is None else list(dict.fromkeys([*before, self.mark]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        prompts = rows["prompt"] if "prompt" in rows.column_names else [None] * len(rows)
        texts = (
            Row(f"row {number}", *("\n".join(texts_of(value)) for value in pair))
            for number, pair in enumerate(zip(prompts, rows[self.column], strict=True))
        )
        reasons = flagged(texts, self._found(), self.region)
        for number, found in enumerate(reasons):
            for reason in found:
                desk.counts.note(reason, f"row {number}")
        desk.counts.figures["flagged"] = sum(map(bool, reasons))
        if self.mark is not None:
            marks = pa.array(["; ".join(found) or None for found in reasons], pa.string())
            return with_columns(rows, {self.mark: marks})
        return rows.select([number for number, found in enumerate(reasons) if not found])

    def _found(self) -> list[Any]:
        if self.patterns is None:
            return []
        if not self.patterns.is_file():
            raise ValueError(f"screen: patterns: {self.patterns}: no such file: `kdlm audit` writes it")
        return patterns_in(self.patterns)
