"""Texts with a class each (GLUE and its like): what a recipe says of them, their rows, and their batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import datasets
import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.data.cache import fingerprint, tokenizer_fingerprint
from kdlm.data.load import Data, pad_id
from kdlm.data.report import DataReport, SourceReport, Unusable
from kdlm.data.sections import Source
from kdlm.data.sources import open_source
from kdlm.section import Section
from kdlm.signal import IGNORE_INDEX

AT_ONCE = 1000
"""Texts that are tokenised together."""


class Row(NamedTuple):
    """A row that was read: its place, its text or both of them as tokens, and its label as it stands there."""

    place: str
    tokens: dict[str, list[int]]
    label: Any


class TextClassesSection(Section):
    """Texts, or pairs of texts, of which each has a class: the columns `text`, `text_pair`, `label`."""

    provides: ClassVar[frozenset[str]] = frozenset({"texts"})
    """What a method may need of it."""

    name: Literal["text_classes"] = "text_classes"
    train: list[Source] = Field(min_length=1)
    """Sources of training rows: files, folders, hub ids, `sandbox:code-modules/train`."""
    eval: list[Source] | None = Field(default=None, min_length=1)
    """Sources of evaluation rows."""
    columns: dict[Literal["text", "text_pair", "label"], str] = {}
    """What kdlm calls a column -> what the sources call it, e.g. `{text: sentence}`; `text_pair` is read only where it
    is named here or there under its own name."""
    classes: list[str] | None = Field(default=None, min_length=2)
    """Names of the classes, in the order of their numbers. By default the labels of the training rows, sorted. A label
    is a name, or a number from 0; one that is missing or -1 leaves a text that only a teacher can be asked about."""
    max_length: int = Field(default=128, ge=4)
    """Most tokens of a row, with the tokenizer's special ones; longer texts are cut at their end, of a pair the longer
    one first."""

    @model_validator(mode="after")
    def _plain_sources(self) -> "TextClassesSection":
        if any(one.weight or one.domain or one.columns for one in [*self.train, *(self.eval or [])]):
            raise ValueError("sources of text_classes take no weight, domain or columns: name columns beside them")
        return self

    def load(self, tokenizer: Any) -> Data:
        """Read and tokenise the splits; `tokenizer` is the student's.

        Raises ValueError when a source is missing, lacks a column or has no usable row, or for a label without a class.
        """
        splits = {"train": self.train} | ({"eval": self.eval} if self.eval else {})
        report = DataReport([])
        read = {name: self._read(sources, getattr(report, name), tokenizer) for name, sources in splits.items()}
        classes = self.classes or _names(row.label for row in read["train"])
        tables = {name: _table(rows, classes) for name, rows in read.items()}
        report.notes.append(f"classes: {', '.join(classes)}")
        made = [self.model_dump(include={"columns", "max_length"}, mode="json"), classes]
        made.append(tokenizer_fingerprint(tokenizer))
        names = {
            name: fingerprint(*(open_source(one).digest(True) for one in sources), *made)
            for name, sources in splits.items()
        }
        collator = ClassCollator(pad_id(tokenizer))
        return Data(tables["train"], tables.get("eval"), collator, report, names, {"classes": list(classes)})

    def look(self) -> list[str]:
        """Return a line for each source. Raises ValueError for one that is not there or lacks a column."""
        lines = []
        for name, sources in (("train", self.train), ("eval", self.eval or [])):
            for number, source in enumerate(sources):
                if source.path.startswith("sandbox:"):
                    lines.append(f"data: {name}: {source.path}")
                    continue
                try:
                    self._columns(source, open_source(source, stream=True).columns)
                    lines.append(f"data: {name}: {source.path} (texts with classes)")
                except ValueError as error:
                    if "loadable from the hub" not in str(error):
                        raise ValueError(f"data.{name}.{number}: {error}") from error
                    lines.append(f"data: {name}: {source.path} not looked at here ({error})")
        return lines

    def _columns(self, source: Source, there: list[str]) -> dict[str, str]:
        named = {"text": "text", "label": "label", **self.columns}
        if "text_pair" in there:
            named = {"text_pair": "text_pair", **named}
        for ours, theirs in named.items():
            if theirs not in there:
                raise ValueError(
                    f"data source {source.path!r}: no column {theirs!r} for {ours}; its columns are "
                    f"{', '.join(map(repr, there))}: say which one in data.columns.{ours}"
                )
        return named

    def _read(self, sources: list[Source], reports: list[SourceReport], tokenizer: Any) -> list[Row]:
        read: list[Row] = []
        for source in sources:
            opened, report = open_source(source), SourceReport(source.path, "texts with classes")
            named = self._columns(source, opened.columns)
            sides = [named[key] for key in ("text", "text_pair") if key in named]
            rows = islice(opened.read(list(named.values())), source.limit)
            while batch := list(islice(rows, AT_ONCE)):
                usable = []
                for place, row in batch:
                    try:
                        usable.append((place, [_text(row, column) for column in sides], row.get(named["label"])))
                    except Unusable as why:
                        report.refuse(place, why)
                for one in self._tokenised(usable, tokenizer):
                    report.keep([len(one.tokens["input_ids"])], 0, len(one.tokens["input_ids"]) == self.max_length)
                    read.append(one)
            if not report.kept:
                raise ValueError("\n".join([f"data source {source.path!r}: no usable row", *report.lines()]))
            reports.append(report)
        return read

    def _tokenised(self, rows: list[tuple[str, list[str], Any]], tokenizer: Any) -> Iterator[Row]:
        if not rows:
            return
        texts = [list(side) for side in zip(*(texts for _, texts, _ in rows), strict=True)]
        made = tokenizer(*texts, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in made]
        for number, (place, _, label) in enumerate(rows):
            yield Row(place, {name: made[name][number] for name in names}, label)


@dataclass(frozen=True)
class ClassCollator:
    """Makes a batch of rows: `input_ids`, `attention_mask` and, where rows have it, `token_type_ids`, padded on the
    right to the longest; `labels` and `index`, one of each row.
    """

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": self._laid([row["input_ids"] for row in rows], longest, self.pad_id)}
        batch["attention_mask"] = self._laid([[1] * len(row["input_ids"]) for row in rows], longest, 0)
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._laid([row["token_type_ids"] for row in rows], longest, 0)
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in ("labels", "index")}

    def _laid(self, lists: list[list[int]], length: int, fill: int) -> Tensor:
        return torch.tensor([[*one, *[fill] * (length - len(one))] for one in lists])


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable("malformed", f"{column} is {type(value).__name__}, not text")
    if not value.strip():
        raise Unusable("empty", f"{column} is empty")
    return value


def _table(rows: list[Row], classes: list[str]) -> datasets.Dataset:
    """Return the rows as batches want them, and their lengths. Raises ValueError for a label without a class."""
    columns: dict[str, list[Any]] = {name: [row.tokens[name] for row in rows] for name in rows[0].tokens}
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    columns["labels"] = [_number(row.label, classes, row.place) for row in rows]
    return datasets.Dataset.from_dict({**columns, "index": list(range(len(rows)))})


def _names(labels: Iterator[Any]) -> list[str]:
    """Return the names of classes: sorted, numbers by their size. Raises ValueError for fewer than two."""
    found = {label for label in labels if label is not None and label != -1}
    numbers = all(isinstance(label, int) for label in found)
    if len(found) < 2 and not numbers:
        raise ValueError(f"data.train: its labels name {len(found)} classes: two are the least; set data.classes")
    if numbers:
        return [str(number) for number in range(max(max(found, default=0), 1) + 1)]
    return sorted(map(str, found))


def _number(label: Any, classes: list[str], place: str) -> int:
    """Return the number of a label's class, or IGNORE_INDEX of a text without one."""
    if label is None or label == -1:
        return IGNORE_INDEX
    if isinstance(label, int) and 0 <= label < len(classes):
        return int(label)
    if str(label) in classes:
        return classes.index(str(label))
    raise ValueError(f"{place}: label {label!r} is none of the classes {', '.join(classes)}: name them in data.classes")
