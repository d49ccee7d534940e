"""Two readings: each row tokenised for the student and for a teacher with another tokenizer, and aligned.

Chat is rendered by each side's own template. A row then carries, beside `input_ids` and `labels`: `chunks`, the chunk
of each token (see `kdlm.data.alignment`), and `their_ids`, `their_labels`, `their_chunks`, the same of the teacher's
reading. Plain text that is too long is split where both readings have a boundary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlm.data.alignment import NONE, Aligner, Chunks
from kdlm.data.collate import Collator
from kdlm.data.encoding import Encoded, Encoder, leading_tokens
from kdlm.data.encoding import Sequence as Tokens
from kdlm.data.files import Row
from kdlm.data.forms import Form
from kdlm.data.report import Unusable
from kdlm.data.sections import DataSection
from kdlm.data.spelling import Spelling
from kdlm.signal import IGNORE_INDEX

COLUMNS = ("chunks", "their_ids", "their_labels", "their_chunks")
"""What a row of two readings carries beside those of one, a number for each token."""


class PairEncoder:
    """Encodes rows for student and teacher.

    Args:
        tokenizer, teacher: the two tokenizers.
        section: of the data; `teacher_chat_template` and `teacher_max_length` are the teacher's.
        form: of the rows.

    Raises ValueError where tokenizers, form and settings do not fit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, section: DataSection, form: Form
    ):
        if form.name == "chat" and section.loss_on == "all":
            raise ValueError("loss_on: all trains on what chat templates write, which differs: use assistant")
        self.form = form
        self.ours = Encoder(tokenizer, section, form)
        try:
            self.theirs = Encoder(teacher, teachers_section(section), form)
        except ValueError as error:
            raise ValueError(f"the teacher's tokenizer: {error}") from error
        self.align = Aligner(Spelling(tokenizer), Spelling(teacher))

    def __call__(self, rows: list[Row]) -> list[Encoded | Unusable]:
        """Return what became of each row."""
        if self.form.name == "text":
            return self._texts(rows)
        return [self._paired(*both) for both in zip(self.ours(rows), self.theirs(rows), strict=True)]

    def _paired(self, ours: Encoded | Unusable, theirs: Encoded | Unusable) -> Encoded | Unusable:
        if isinstance(ours, Unusable) or isinstance(theirs, Unusable):
            return ours if isinstance(ours, Unusable) else theirs
        (mine,), (other,) = ours.sequences, theirs.sequences
        chunks, their_chunks = self.align(mine.ids, mine.labels, other.ids, other.labels)
        if ours.trained and chunks.max(initial=NONE) == NONE:
            return Unusable("not aligned", "the two readings do not spell the same answers")
        beside = {"chunks": chunks, "their_ids": other.ids, "their_labels": other.labels, "their_chunks": their_chunks}
        return Encoded([Tokens(mine.ids, mine.labels, beside)], ours.truncated)

    def _texts(self, rows: list[Row]) -> list[Encoded | Unusable]:
        encoded: list[Encoded | Unusable] = []
        for ours, theirs in zip(self.ours.documents(rows), self.theirs.documents(rows), strict=True):
            if isinstance(ours, Unusable):
                encoded.append(ours)
                continue
            assert not isinstance(theirs, Unusable), "whether a text can be read does not depend on the tokenizer"
            pieces = list(self._pieces(ours, theirs))
            encoded.append(Encoded(pieces) if pieces else Unusable("not aligned", "no boundary is shared"))
        return encoded

    def _pieces(self, ids: list[int], their_ids: list[int]) -> Iterator[Tokens]:
        """Yield consecutive pieces of a text that are short enough for both, each with one token of the one before."""
        labels, their_labels = [IGNORE_INDEX, *ids[1:]], [IGNORE_INDEX, *their_ids[1:]]
        chunks, their_chunks = self.align(ids, labels, their_ids, their_labels)
        count = int(chunks.max(initial=NONE)) + 1
        stops, their_stops = (np.searchsorted(_ascending(c), np.arange(count), "right") for c in (chunks, their_chunks))
        begin, their_begin, first = 0, 0, 0
        while first < count:
            fits = (stops - begin <= self.ours.section.max_length) & (
                their_stops - their_begin <= self.theirs.section.max_length
            )
            last = int(np.flatnonzero(fits)[-1]) if fits.any() else NONE
            if last >= first:
                stop, their_stop = int(stops[last]), int(their_stops[last])
                yield Tokens(
                    ids[begin:stop],
                    [IGNORE_INDEX, *labels[begin + 1 : stop]],
                    {
                        "chunks": _cut(chunks[begin:stop], first),
                        "their_ids": their_ids[their_begin:their_stop],
                        "their_labels": [IGNORE_INDEX, *their_labels[their_begin + 1 : their_stop]],
                        "their_chunks": _cut(their_chunks[their_begin:their_stop], first),
                    },
                )
            else:  # a chunk that is longer than a sequence may be is left out
                last = first
            begin, their_begin, first = int(stops[last]) - 1, int(their_stops[last]) - 1, last + 1


def teachers_section(section: DataSection) -> DataSection:
    """Return the section as it reads for the teacher."""
    return section.model_copy(
        update={
            "chat_template": section.teacher_chat_template,
            "max_length": section.teacher_max_length or section.max_length,
            "truncation": "right",
        }
    )


def _ascending(chunks: Chunks) -> Chunks:
    """Return chunks with those of tokens in none put below the next one's, so that they can be searched."""
    return np.maximum.accumulate(chunks)


def _cut(chunks: Chunks, first: int) -> Chunks:
    """Number the chunks of a piece from 0; the token it shares with the piece before is in none."""
    return np.where(chunks >= first, chunks - first, NONE)


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of two readings: the student's, and in it `theirs`, the teacher's.

    To what `Collator` makes it adds, in both, `chunks` `[batch, length]`: the chunk of each token, numbered over the
    whole batch, -1 where it is in none; and `bytes`, how many bytes of text the trained tokens of each row spell. Rows
    that come without the teacher's reading (the student's own text) are read here.

    Attributes:
        ours: lays out the student's reading.
        theirs: lays out the teacher's.
        tokenizer, teacher: the two tokenizers.
    """

    ours: Collator
    theirs: Collator
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    read: "Reader" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "read", Reader(self.tokenizer, self.teacher))

    @property
    def spellings(self) -> tuple[Spelling, Spelling]:
        """What the tokens of the student's and of the teacher's tokenizer spell."""
        return self.read.spelling, Spelling(self.teacher)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        both = [row if "their_ids" in row else {**row, **self.read(row)} for row in rows]
        batch: dict[str, Any] = self.ours([_ours(row) for row in both])
        theirs = self.theirs([_theirs(row) for row in both])
        counts = [int(np.max(row["chunks"], initial=NONE)) + 1 for row in both]
        starts = np.cumsum([0, *counts])
        for name, place, layout in (("chunks", batch, self.ours), ("their_chunks", theirs, self.theirs)):
            numbers = [np.where(c >= 0, c + start, NONE) for start, c in zip(starts, _arrays(both, name), strict=False)]
            place["chunks"] = layout.beside(numbers, place, NONE)
        batch["bytes"] = self._bytes(both)
        return batch | {"theirs": theirs}

    def _bytes(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        lengths = self.read.spelling.lengths
        ids, labels = _arrays(rows, "input_ids"), _arrays(rows, "labels")
        return torch.tensor(
            [int(lengths[i[label != IGNORE_INDEX]].sum()) for i, label in zip(ids, labels, strict=True)]
        )


def _arrays(rows: Sequence[dict[str, Any]], name: str) -> list[np.ndarray]:
    return [np.asarray(row[name], dtype=np.int64) for row in rows]


def _ours(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in COLUMNS}


def _theirs(row: dict[str, Any]) -> dict[str, Any]:
    lengths = {"seq_lengths": row["their_lengths"]} if "their_lengths" in row else {}
    beside = {name: row[name] for name in ("index", "domain") if name in row}
    return {"input_ids": row["their_ids"], "labels": row["their_labels"], **lengths, **beside}


class Reader:
    """Reads, for the teacher, text that exists as the student's tokens only: what the student wrote.

    The teacher's prompt is the row's `their_prompt` where it has one (rendered by the teacher's template), else the
    student's as text.

    Raises ValueError where the student's tokens do not say which text they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.tokenizer, self.teacher = tokenizer, teacher
        self.spelling = Spelling(tokenizer)

    @cached_property
    def align(self) -> Aligner:
        if not self.spelling.exact:
            raise ValueError(
                "the student's tokenizer does not give back the text that it reads, so its own text cannot be read by "
                "a teacher with another tokenizer"
            )
        return Aligner(self.spelling, Spelling(self.teacher))

    @cached_property
    def leading(self) -> list[int]:
        return leading_tokens(self.teacher)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the columns that the row lacks."""
        ids, labels = (list(map(int, row[name])) for name in ("input_ids", "labels"))
        trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
        gaps = np.flatnonzero(np.diff(trained) > 1)
        start = len(ids) if not len(trained) else int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
        if start == 1 and ids[0] not in self.spelling.control and "their_prompt" not in row:
            start = 0
        answer = ids[start:]
        closing: list[int] = []
        while answer and answer[-1] in self.spelling.control:
            answer.pop()
            closing = self._closing(row)
        prompt = list(map(int, row["their_prompt"])) if "their_prompt" in row else self._prompt(ids[:start])
        their_ids = [*prompt, *self._read(answer), *closing]
        their_labels = [*[IGNORE_INDEX] * len(prompt), *their_ids[len(prompt) :]]
        their_labels[:1] = [IGNORE_INDEX]
        chunks, their_chunks = self.align(ids, labels, their_ids, their_labels)
        return {"chunks": chunks, "their_ids": their_ids, "their_labels": their_labels, "their_chunks": their_chunks}

    def _prompt(self, ids: list[int]) -> list[int]:
        return [*self.leading, *self._read([token for token in ids if token not in self.spelling.control])]

    def _read(self, ids: list[int]) -> list[int]:
        """Return the teacher's tokens of a text, up to where the student's bytes are no text."""
        spelt = self.align.ours.text(ids) or b""
        try:
            text = spelt.decode()
        except UnicodeDecodeError as error:
            text = spelt[: error.start].decode()
        return self.align.theirs.ids(text) if text else []

    def _closing(self, row: dict[str, Any]) -> list[int]:
        """Return what ends the teacher's answer: what ends the data's, or its end-of-sequence token."""
        if len(row.get("their_closing", ())):
            return list(map(int, row["their_closing"]))
        eos: Any = self.teacher.eos_token_id
        return [] if eos is None else [int(eos)]
