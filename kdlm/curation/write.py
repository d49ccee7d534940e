"""The step `write`: columns made of other columns, by templates."""

import json
from string import Formatter
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field, field_validator

from kdlm.curation.step import Desk, Step, as_prompt, need, with_column


class Write(Step):
    """Writes columns from a template of the columns that the rows came with.

    A row that lacks a value, null or empty, is left out and counted. In a prompt that holds messages, `{prompt}` is the
    last message, and a new prompt takes its place: the conversation stays.
    """

    name: Literal["write"] = "write"
    columns: dict[str, str] = Field(min_length=1)
    """Column -> template, with columns in braces: {prompt: "[label] {prompt}", completion: "{thoughts}\\n{answer}"}.
    Braces that are meant are doubled: {completion: "\\\\boxed{{{answer}}}"}."""

    @field_validator("columns")
    @classmethod
    def _parses(cls, columns: dict[str, str]) -> dict[str, str]:
        for name, template in columns.items():
            try:
                fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
            except ValueError as error:
                raise ValueError(f"{name}: {error}: double the braces that are meant: {{{{ }}}}") from error
            if odd := [field for field in fields if not field.isidentifier()]:
                raise ValueError(f"{name}: {{{odd[0]}}} names no column: double the braces that are meant: {{{{ }}}}")
        return columns

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        fields = {field: None for text in self.columns.values() for _, field, _, _ in Formatter().parse(text) if field}
        need(rows, *fields, by="write")
        written: dict[str, list[str]] = {name: [] for name in self.columns}
        kept = []
        read = list(dict.fromkeys([*fields, *self._prompt(rows)]))
        for number, row in enumerate(map(dict, rows.select_columns(read))):
            lacking = next((field for field in fields if row[field] is None or row[field] == ""), None)
            if lacking is not None:
                desk.counts.note(f"no {lacking}", f"row {number}")
                continue
            kept.append(number)
            for name, text in self._written(row).items():
                written[name].append(text)
        rows = rows.select(kept)
        for name, values in written.items():
            rows = with_column(rows, name, values)
        return rows

    def _prompt(self, rows: Dataset) -> list[str]:
        return ["prompt"] if "prompt" in self.columns and "prompt" in rows.column_names else []

    def _written(self, row: dict[str, Any]) -> dict[str, str]:
        prompt = as_prompt(row["prompt"]) if row.get("prompt") else None
        if not isinstance(prompt, list):
            return {name: template.format(**row) for name, template in self.columns.items()}
        values = row | {"prompt": prompt[-1]["content"]}
        written = {name: template.format(**values) for name, template in self.columns.items()}
        if "prompt" in written:
            turns = [*prompt[:-1], {**prompt[-1], "content": written["prompt"]}]
            written["prompt"] = json.dumps(turns, ensure_ascii=False)
        return written
