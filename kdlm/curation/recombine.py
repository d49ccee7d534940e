"""The step `recombine`: new sets of the concepts that the rows have."""

import random
from math import comb
from typing import Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.step import Desk, Step, lacks


class Recombine(Step):
    """Draws new sets of concepts, each of which no row has, for new problems (PromptCoT 2.0, arXiv 2509.19894).

    Makes rows of `concepts` alone, and of `prompt`, which is the same; what came before ends here.
    """

    name: Literal["recombine"] = "recombine"
    column: str = "concepts"
    """The column of concepts."""
    separator: str = Field("; ", min_length=1)
    """What stands between two concepts."""
    size: int = Field(2, ge=1)
    """Concepts of a new set."""
    count: int = Field(ge=1)
    """New sets; fewer where there are not so many."""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        known = {frozenset(self._parts(text)) for text in rows[self.column] if text}
        pool = sorted({concept for one in known for concept in one})
        drawn: dict[frozenset[str], None] = {}
        generator = random.Random(f"recombine {desk.seed}")
        left = comb(len(pool), self.size) - sum(len(one) == self.size for one in known)
        while len(drawn) < min(self.count, left):
            one = frozenset(generator.sample(pool, self.size))
            if one not in known:
                drawn.setdefault(one)
        desk.counts.figures["concepts"] = len(pool)
        if left < self.count:
            desk.counts.note("no further set of concepts", f"{left} of {self.count}", self.count - left)
        texts = [self.separator.join(sorted(one)) for one in drawn]
        return Dataset.from_dict({"prompt": texts, self.column: texts})

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.column, by="recombine")
        return list(dict.fromkeys(["prompt", self.column]))

    def _parts(self, text: str) -> list[str]:
        return [part.strip() for part in text.split(self.separator.strip() or self.separator) if part.strip()]
