"""The step `write`: columns made of other columns, by templates."""

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.prompts import last_said, prompt_of
from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step
from kdlm.curation.templates import check_template, columns_of, filled
from kdlm.data.report import Unusable


class Write(Step):
    """Writes columns from templates of the columns that the rows came with.

    A row that lacks a value, null or empty, is left out and counted. In a prompt that holds messages, `{prompt}` is the
    last message, and a new prompt takes its place: the conversation stays.
    """

    name: Literal["write"] = "write"
    columns: dict[str, str] = Field(min_length=1)
    """Column -> template, with columns in braces: {prompt: "[label] {prompt}", completion: "\\\\boxed{{answer}}"}."""

    def leaves(self, before: list[str]) -> list[str]:
        for name, template in self.columns.items():
            check_template(template, before, f"write: columns.{name}")
        return list(dict.fromkeys([*before, *self.columns]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        fields = list(dict.fromkeys(field for text in self.columns.values() for field in columns_of(text)))
        kept, written = [], []
        for number, row in enumerate(map(dict, rows)):
            try:
                if (lacking := next((field for field in fields if row[field] in (None, "")), None)) is not None:
                    raise Unusable(f"no {lacking}")
                written.append(self._written(row))
                kept.append(number)
            except Unusable as why:
                desk.counts.note(why.reason, f"row {number}")
        columns = {name: pa.array([row[name] for row in written], pa.string()) for name in self.columns}
        return with_columns(rows.select(kept), columns)

    def _written(self, row: Mapping[str, Any]) -> dict[str, str | None]:
        written = {name: filled(template, last_said(row)) for name, template in self.columns.items()}
        return written | ({"prompt": prompt_of(row, self.columns["prompt"])} if "prompt" in written else {})
