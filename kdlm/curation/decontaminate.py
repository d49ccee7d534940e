"""The step `decontaminate`: rows that hold a piece of an evaluation set leave, or are marked."""

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import placed, with_columns
from kdlm.curation.step import Counts, Desk, Step, lacks
from kdlm.curation.words import ngrams, normal, texts_of
from kdlm.data.sections import Source
from kdlm.data.sources import open_source

SHOWN = 80
"""Characters of a text that a report quotes."""


class Decontaminate(Step):
    """Leaves out rows that share a run of words with an item of an evaluation set (GPT-3, arXiv 2005.14165, C).

    Of an evaluation set its questions count: `prompt` without system messages, else `text`. Case and punctuation do
    not. A row whose whole text is an item's is found too, however short it is.
    """

    name: Literal["decontaminate"] = "decontaminate"
    against: list[Source] = Field(min_length=1)
    """The evaluation sets, said as sources are."""
    columns: list[str] = Field(["prompt"], min_length=1)
    """The columns that are looked through; `completion` too where a writer may recite."""
    words: int = Field(13, ge=2)
    """Length of a run of words (GPT-3: 13; 8 for sets of short questions)."""
    share: float = Field(0.0, ge=0, le=1)
    """The share of an item's runs that a row must hold; 0: one run is enough."""
    common: int = Field(10, ge=1)
    """A run that more items than this hold is their template: runs that lie in it for more than the half show nothing.
    Items without any other run are found by their whole text alone."""
    mark: str | None = None
    """Leave no row out, and write the item that it meets into this column; null where it meets none."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "content": [open_source(source).digest(True) for source in self.against]}

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, *self.columns, by="decontaminate")
        for source in self.against:
            open_source(source)
        return before if self.mark is None else list(dict.fromkeys([*before, self.mark]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        known = _Items.read(self, desk.counts)
        met: list[str | None] = []
        shared: Counter[str] = Counter()
        found: set[int] = set()
        for number, row in enumerate(map(dict, rows.select_columns(self.columns))):
            meeting = known.meeting(row, self)
            met.append(None)
            if meeting is None:
                continue
            item, share, grams = meeting
            found.add(item)
            shared.update(grams)
            met[-1] = f"{known.places[item]}, share {share:.2g}"
            quoted = grams[0] if grams else known.texts[item][-1]
            desk.counts.note(f"overlaps with {known.sources[item]}", f"row {number} meets {met[-1]}: {quoted[:SHOWN]}")
        desk.counts.figures["evaluation items met"] = f"{len(found)} of {len(known.places)}"
        if shared:
            gram, times = shared.most_common(1)[0]
            desk.counts.figures["most frequent shared run"] = f"{times} rows, {gram[:SHOWN]!r}"
        if self.mark is not None:
            return with_columns(rows, {self.mark: pa.array(met, pa.string())})
        return rows.select([number for number, item in enumerate(met) if item is None])


@dataclass
class _Items:
    """The evaluation items, each distinct one once: where they are, how many runs they have, and who holds a run."""

    sources: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    sizes: Counter[int] = field(default_factory=Counter)
    holders: dict[str, list[int]] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, step: Decontaminate, counts: Counts) -> "_Items":
        items = cls()
        for source in step.against:
            for place, row in placed(source, open_source(source), counts):
                asked = texts_of(row["prompt"] if "prompt" in row else row["text"], system=False)
                items._add(source.path, place, asked)
        held = Counter(gram for texts in items.texts for gram in _runs(texts, step.words))
        common = {gram: count for gram, count in held.items() if count > step.common}
        for number, texts in enumerate(items.texts):
            for gram in _runs(texts, step.words, common):
                items.holders.setdefault(gram, []).append(number)
                items.sizes[number] += 1
        counts.figures["evaluation items"] = len(items.places)
        counts.figures["found by their whole text alone"] = len(items.places) - len(items.sizes)
        if common:
            gram = max(common, key=lambda gram: common[gram])
            said = f"{len(common)}, such as {gram[:SHOWN]!r} in {common[gram]} items"
            counts.figures[f"runs in more than {step.common} items"] = said
        return items

    def _add(self, source: str, place: str, texts: list[str]) -> None:
        key = normal("\n".join(texts))
        if not key or key in self.whole:
            return
        self.whole[key] = len(self.places)
        self.sources.append(source)
        self.places.append(place)
        self.texts.append(texts)

    def meeting(self, row: dict[str, Any], step: Decontaminate) -> tuple[int, float, list[str]] | None:
        """Return the item that a row meets most, the share of its runs that the row holds, and these."""
        grams: dict[int, list[str]] = {}
        for column in step.columns:
            texts = texts_of(row[column])
            for text in ["\n".join(texts), *texts]:
                if (item := self.whole.get(normal(text))) is not None:
                    return item, 1.0, []
            for gram in _runs(texts, step.words):
                for item in self.holders.get(gram, ()):
                    grams.setdefault(item, []).append(gram)
        shares = {item: len(set(held)) / self.sizes[item] for item, held in grams.items()}
        best = max(shares, key=lambda item: shares[item], default=None)
        return None if best is None or shares[best] < step.share else (best, shares[best], grams[best])


def _runs(texts: list[str], length: int, common: Container[str] = ()) -> dict[str, None]:
    """Return the runs of words of an item, each once: those of whose words at most the half are in common runs."""
    own: dict[str, None] = {}
    for text in texts:
        grams = ngrams(text, length)
        if not common:
            own.update(dict.fromkeys(grams))
            continue
        template = {at + word for at, gram in enumerate(grams) if gram in common for word in range(length)}
        own.update((gram, None) for at, gram in enumerate(grams) if 2 * _inside(template, at, length) <= length)
    return own


def _inside(template: set[int], at: int, length: int) -> int:
    return sum(word in template for word in range(at, at + length))
