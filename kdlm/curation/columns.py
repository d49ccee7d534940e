"""The step `columns`: other names, fewer columns."""

from typing import Any, Literal

from datasets import Dataset
from pydantic import model_validator

from kdlm.curation.step import Desk, Step, lacks


class Columns(Step):
    """Renames columns, and drops some."""

    name: Literal["columns"] = "columns"
    rename: dict[str, str] = {}
    """Column -> its new name."""
    drop: list[str] = []
    """The columns that leave, before others are renamed."""

    @model_validator(mode="after")
    def _agrees(self) -> "Columns":
        if not (self.rename or self.drop):
            raise ValueError("says nothing: give rename or drop")
        if twice := [name for name in self.rename.values() if list(self.rename.values()).count(name) > 1]:
            raise ValueError(f"rename: two columns become {twice[0]!r}")
        return self

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, *self.drop, *self.rename, by="columns")
        names = [self.rename.get(name, name) for name in before if name not in self.drop]
        if taken := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"columns: {taken[0]!r} is there already: drop it first")
        return names

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        names = self.leaves(rows.column_names)
        staying: Any = rows.remove_columns(self.drop).with_format("arrow")[:]
        return Dataset(staying.rename_columns(names).replace_schema_metadata(None))
