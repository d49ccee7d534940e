"""The step `entity_questions`: a teacher's list of entities becomes questions, one for each type."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import dataset_of
from kdlm.curation.step import Desk, Step, digest, lacks

Found = dict[str, list[str]]
"""Mentions by type, in the order of the passage."""

CATCH_ALL = ("entity", "misc", "miscellaneous", "other", "others", "unknown", "none", "na")
FENCE = re.compile(r"^\s*```(?:json)?\s*|\s*```\s*$")


class EntityQuestions(Step):
    """Makes questions for named entities of what a teacher found in a passage (UniversalNER, arXiv 2308.03279).

    Reads the passage and the teacher's answer, a JSON list of `{"entity": ..., "type": ...}` or `[entity, type]`. Every
    type of a passage is asked for by itself and answered by a JSON list of its mentions (all types in one question cost
    the paper 3.3 F1); types that the passage lacks are drawn by their frequency among all passages and answered by an
    empty list. Answers that are no such list are counted and left out, as are catch-all types, mentions that are not in
    the passage, and passages of which nothing is left. How many types are drawn is our choice: the paper does not say.

    `conversation` writes `messages`, for chat models: the passage, then all questions. `questions` writes a `prompt`
    and a `completion` for each question.
    """

    name: Literal["entity_questions"] = "entity_questions"
    passage: str = "text"
    """The column of passages."""
    answer: str = "completion"
    """The column of what the teacher found."""
    form: Literal["conversation", "questions"] = "conversation"
    """One conversation for each passage, or one row for each question."""
    negatives: int = Field(2, ge=0)
    """Types asked for that the passage lacks."""
    dataset: str | None = None
    """Name of the data set, said before the passage: for supervised mixtures whose labels disagree. Leave it out where
    the student is to answer about texts of no data set."""
    question: str = "What describes {type} in the text?"
    """The question, with `{type}` in it."""
    catch_all: list[str] = list(CATCH_ALL)
    """Types that are no types."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, self.passage, self.answer, by="entity_questions")
        ours = ["messages"] if self.form == "conversation" else ["prompt", "completion"]
        return [*(name for name in before if name not in (self.passage, self.answer, "prompt", *ours)), *ours]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        names = self.leaves(rows.column_names)
        read: list[tuple[dict[str, Any], Found]] = []
        for number, row in enumerate(rows):
            values: dict[str, Any] = dict(row)
            found = self._found(values, f"row {number}", desk)
            if found:
                read.append((values, found))
        types = Counter(kind for _, found in read for kind in found)
        desk.counts.figures |= {"types": len(types), "mentions": sum(len(m) for _, f in read for m in f.values())}
        if not read:
            raise ValueError("\n".join(["entity_questions: no passage has an entity left", *desk.counts.lines()]))
        made = [one for values, found in read for one in self._made(values, found, types, desk.seed)]
        return dataset_of(made).select_columns(names)

    def _found(self, row: dict[str, Any], place: str, desk: Desk) -> Found | None:
        listed = entities_in(row[self.answer] or "")
        if listed is None or row[self.passage] is None:
            desk.counts.note("no list of entities", place)
            return None
        found: Found = {}
        for entity, kind in listed:
            if kind.lower() in self.catch_all:
                desk.counts.note("a catch-all type", f"{place}: {kind}")
            elif entity not in row[self.passage]:
                desk.counts.note("a mention that is not in the passage", f"{place}: {entity}")
            elif entity not in found.setdefault(kind, []):
                found[kind].append(entity)
        if not found:
            desk.counts.note("no entity left", place)
        return {kind: sorted(mentions, key=row[self.passage].index) for kind, mentions in found.items()}

    def _made(self, row: dict[str, Any], found: Found, types: Counter[str], seed: int) -> Iterator[dict[str, Any]]:
        passage = row[self.passage]
        text = f"Text: {passage}" if self.dataset is None else f"Dataset: {self.dataset}\nText: {passage}"
        draw = random.Random(digest([seed, passage]))
        asked = {**found, **{kind: [] for kind in drawn(types, set(found), self.negatives, draw)}}
        order = draw.sample(sorted(asked), len(asked))
        kept = {name: value for name, value in row.items() if name not in (self.passage, self.answer, "prompt")}
        pairs = [(self.question.replace("{type}", kind), json.dumps(asked[kind], ensure_ascii=False)) for kind in order]
        if self.form == "questions":
            for question, answer in pairs:
                yield kept | {"prompt": f"{text}\n{question}", "completion": answer}
            return
        said = [("user", text), ("assistant", "I've read this text.")]
        said += [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
        yield kept | {"messages": [{"role": role, "content": content} for role, content in said]}


def entities_in(text: str) -> list[tuple[str, str]] | None:
    """Return the (entity, type) pairs of a JSON list, None where a text is no such list."""
    try:
        listed = json.loads(FENCE.sub("", text))
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    pairs = [[one.get("entity"), one.get("type")] if isinstance(one, dict) else one for one in listed]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair) for pair in pairs
    ):
        return None
    return [(str(entity), str(kind).strip()) for entity, kind in pairs]


def drawn(types: Counter[str], present: set[str], count: int, draw: random.Random) -> list[str]:
    """Draw different types in proportion to their frequency, none of those present."""
    left = {kind: types[kind] for kind in sorted(types) if kind not in present}
    chosen: list[str] = []
    while left and len(chosen) < count:
        (kind,) = draw.choices(list(left), list(left.values()))
        chosen.append(kind)
        del left[kind]
    return chosen
