"""The step `columns`: other names, fewer columns."""

from typing import Literal

from datasets import Dataset
from pydantic import model_validator

from kdlm.curation.step import Desk, Step, need


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

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        need(rows, *self.drop, *self.rename, by="columns")
        staying = [name for name in rows.column_names if name not in self.drop]
        names = [self.rename.get(name, name) for name in staying]
        if taken := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"columns: {taken[0]!r} is there already: drop it first")
        return Dataset(rows.select_columns(staying).with_format("arrow")[:].rename_columns(names))
