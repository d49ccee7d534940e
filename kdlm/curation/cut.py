"""The step `cut`: what was written is cut at a random place, for another model to go on."""

import json
import random
import re
from typing import Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, digest, lacks


class Cut(Step):
    """Cuts every completion at a random place between two words: adds `<into>`, and `<into>_by`, the model that wrote.

    The mixed policy of DASD (arXiv 2601.09088): `generate` by the student, `filter` to `stop: length`, `cut`, and
    `generate` by the teacher with `prefix: prefix`; all of it is trained on. The place depends on the seed and the text
    alone. Rows with nowhere to cut are left out and counted.
    """

    name: Literal["cut"] = "cut"
    column: str = "completion"
    """The column that is cut."""
    into: str = "prefix"
    """The column that takes what is left."""
    at_least: float = Field(0.0, ge=0, le=1)
    """Smallest share of the text that is kept."""
    at_most: float = Field(1.0, ge=0, le=1)
    """Largest share of the text that is kept."""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        kept, prefixes, by = [], [], []
        for number, row in enumerate(rows):
            text = row[self.column] or ""  # pyright: ignore[reportCallIssue, reportArgumentType]
            low, high = (share * len(text) for share in (self.at_least, self.at_most))
            ends = [gap.start() for gap in re.finditer(r"\s+", text) if gap.start() and low <= gap.start() <= high]
            if not ends:
                desk.counts.note("nowhere to cut", f"row {number}")
                continue
            place = random.Random(digest([desk.seed, row["prompt"], text])).choice(ends)  # pyright: ignore
            kept.append(number)
            prefixes.append(text[:place])
            by.append(json.dumps({"model": row.get("model"), "revision": row.get("revision")}))  # pyright: ignore
        own = {self.into: pa.array(prefixes, pa.string()), f"{self.into}_by": pa.array(by, pa.string())}
        return with_columns(rows.select(kept), own)

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt", self.column, by="cut")
        return list(dict.fromkeys([*before, self.into, f"{self.into}_by"]))
