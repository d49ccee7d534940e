"""The step `tokens`: how many tokens a text has."""

from typing import Literal

import pyarrow as pa
from datasets import Dataset

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.curation.words import texts_of
from kdlm.models import named


class Tokens(Step):
    """Counts the tokens of a text, for `filter` and `select` to go by. `generate` counts those that it wrote itself."""

    name: Literal["tokens"] = "tokens"
    tokenizer: str
    """Whose tokens: a hub id, a folder, or `sandbox:code-student`."""
    column: str = "completion"
    """The column whose text is counted; of messages their texts, without the marks of a chat template."""
    into: str = "tokens"
    """The column that takes the count; null where there is no text."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.column, by="tokens")
        return list(dict.fromkeys([*before, self.into]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        tokenizer = named(self.tokenizer).tokenizer()
        counted: list[int | None] = []
        for value in rows[self.column]:
            texts = texts_of(value)
            counted.append(sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) or None)
        known = [count for count in counted if count is not None]
        if known:
            desk.counts.figures["tokens"] = f"{sum(known)}, {min(known)} to {max(known)} in a row"
        return with_columns(rows, {self.into: pa.array(counted, pa.int64())})
