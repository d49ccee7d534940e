"""The step `deduplicate`: of rows whose texts are the same, or nearly, one stays."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from datasets import Dataset
from jaxtyping import UInt64
from pydantic import Field

from kdlm.curation.ranking import Ranking
from kdlm.curation.step import Desk
from kdlm.curation.words import ngrams, normal, numbers, texts_of

if TYPE_CHECKING:
    from datasketch import MinHash

PERMUTATIONS = 128
"""Hashes of a MinHash signature."""
MISSED = 0.98
"""What a missed duplicate weighs against a false candidate, where bands are chosen: candidates are compared exactly."""


class Deduplicate(Ranking):
    """Leaves out rows whose text is that of a row that stays, or nearly: the Jaccard similarity of their shingles.

    Candidates come from MinHash (Broder 1997) in bands, by the datasketch library, and are compared exactly: what
    leaves has the similarity. Bands can miss a pair, seldom one well above `near`.
    """

    name: Literal["deduplicate"] = "deduplicate"
    columns: list[str] = Field(["prompt"], min_length=1)
    """The columns that are compared; several count as one text. After `generate`: [prompt, completion]."""
    near: float | None = Field(0.8, ge=0.1, lt=1)
    """The similarity from which on texts are the same; null: where they are, but for case, spacing, punctuation."""
    shingle: int = Field(5, ge=1)
    """Words of a shingle. Texts with fewer are compared as a whole."""
    same_numbers: bool = True
    """Two texts that are nearly the same are two problems where they differ in a number."""

    def compared(self) -> list[str]:
        return self.columns

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        index = None if self.near is None else _Index(self, desk.seed)
        kept: dict[str, int] = {}
        table = rows.select_columns(self.columns)
        for number in self.ranked(rows, desk):
            text = "\n".join(one for column in self.columns for one in [*texts_of(table[number][column]), ""])
            first = kept.setdefault(normal(text), number)
            if first != number:
                desk.counts.note("the same text", f"row {number} as row {first}")
            elif index is not None and (near := index.find(text, number)) is not None:
                kept[normal(text)] = near[0]
                desk.counts.note("nearly the same text", f"row {number} as row {near[0]}, similarity {near[1]:.2f}")
        return rows.select(sorted(number for number in set(kept.values())))


@dataclass(frozen=True)
class _Text:
    shingles: UInt64[np.ndarray, " shingles"]
    numbers: Any

    def similarity(self, other: "_Text") -> float:
        both = len(np.intersect1d(self.shingles, other.shingles, assume_unique=True))
        return both / (len(self.shingles) + len(other.shingles) - both)


class _Index:
    """The texts that stay, found by a text that is nearly one of them. Raises ValueError without datasketch."""

    def __init__(self, step: Deduplicate, seed: int) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError(
                f"deduplicate: datasketch cannot be imported ({error}): pip install 'kdlm[curate]', or say near: null"
            ) from error
        assert step.near is not None
        self.step, self.near = step, step.near
        self.kept: dict[int, _Text] = {}
        self._empty = MinHash(PERMUTATIONS, seed=seed % 2**32, hashfunc=int)
        self._bands = MinHashLSH(step.near, PERMUTATIONS, weights=(1 - MISSED, MISSED))

    def find(self, text: str, number: int) -> tuple[int, float] | None:
        """Return the row that a text is nearly the same as, and the similarity; where there is none, keep the text."""
        hashes = {xxhash.xxh3_64_intdigest(shingle.encode()) for shingle in ngrams(text, self.step.shingle)}
        if not hashes:
            return None
        given = _Text(np.array(sorted(hashes), dtype=np.uint64), numbers(text) if self.step.same_numbers else None)
        signature = self._empty.copy()
        signature.update_batch((given.shingles >> np.uint64(32)).tolist())
        alike = max(self._alike(given, signature), default=None)
        if alike is not None:
            return -alike[1], alike[0]
        self.kept[number] = given
        self._bands.insert(number, signature)
        return None

    def _alike(self, given: _Text, signature: "MinHash") -> Iterator[tuple[float, int]]:
        candidates: list[Any] = self._bands.query(signature)
        for candidate in candidates:
            kept = self.kept[candidate]
            if kept.numbers == given.numbers and (share := given.similarity(kept)) >= self.near:
                yield share, -candidate
