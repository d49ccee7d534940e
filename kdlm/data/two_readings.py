"""Two readings: each row tokenised for the student and for a teacher with another tokenizer, and aligned.

Chat is rendered by each side's own template. A row then carries, beside `input_ids` and `labels`: `chunks`, the chunk
of each token (see `kdlm.data.alignment`), and `their_ids`, `their_labels`, `their_chunks`, the same of the teacher's
reading. Plain text that is too long is split where both readings have a boundary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kdlm.data.alignment import NONE, Aligner, Chunks, count_answers, numbered_on
from kdlm.data.collate import Collator, lengths_in
from kdlm.data.encoding import Encoded, Encoder
from kdlm.data.encoding import Sequence as Tokens
from kdlm.data.files import Row
from kdlm.data.forms import Form
from kdlm.data.own_text import Reader
from kdlm.data.report import Unusable
from kdlm.data.sections import DataSection
from kdlm.signal import IGNORE_INDEX
from kdlm.spelling import Spelling, spelling_of

COLUMNS = ("chunks", "their_ids", "their_labels", "their_chunks")
"""What a row of two readings carries beside those of one, a number for each token."""
CLOSING = "their_closing"
"""And one more: the tokens that end an answer in the teacher's reading."""

TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
"""A conversation that shows how a chat template ends a turn."""


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
        if form.name == "preference":
            raise ValueError("preferences are read by the student alone: use a teacher with its tokenizer, or none")
        self.form = form
        self.ours = Encoder(tokenizer, section, form)
        try:
            self.theirs = Encoder(teacher, teachers_section(section), form)
        except ValueError as error:
            said = str(error).replace("data.chat_template", "data.teacher_chat_template")
            raise ValueError(f"the teacher's tokenizer: {said}") from error
        self.align = Aligner(spelling_of(tokenizer), spelling_of(teacher))

    def __call__(self, rows: list[Row]) -> list[Encoded | Unusable]:
        """Return what became of each row."""
        if self.form.name == "text":
            return self._texts(rows)
        return [self._paired(*both) for both in zip(self.ours(rows), self.theirs(rows), strict=True)]

    def _paired(self, ours: Encoded | Unusable, theirs: Encoded | Unusable) -> Encoded | Unusable:
        if isinstance(ours, Unusable) or isinstance(theirs, Unusable):
            return ours if isinstance(ours, Unusable) else theirs
        (mine,), (other,) = ours.sequences, theirs.sequences
        both = (mine.ids, mine.labels, other.ids, other.labels)
        counts = count_answers(mine.labels), count_answers(other.labels)
        if counts[0] != counts[1] and not (ours.truncated or theirs.truncated):
            return Unusable(
                "not aligned", f"{counts[0]} answers by the student's template, {counts[1]} by the teacher's"
            )
        chunks, their_chunks = self.align(*both)
        if ours.trained and chunks.max(initial=NONE) == NONE:
            return Unusable("not aligned", self.align.apart(*both))
        closing = self.turn_end if theirs.rendered else [self.theirs.eos]
        beside = _columns(chunks, other.ids, other.labels, their_chunks, closing)
        return Encoded([Tokens(mine.ids, mine.labels, beside)], ours.truncated or theirs.truncated)

    @cached_property
    def turn_end(self) -> list[int]:
        """The tokens of no text with which the teacher's chat template ends a turn; its end token if it refuses."""
        spelling = self.align.theirs
        try:
            text, spans = self.theirs.template.render(TURN, None)
        except (Unusable, ValueError):
            return [] if self.theirs.eos is None else [self.theirs.eos]
        ids = spelling.ids(text[slice(*spans[-1])])
        return ids[len(ids) - sum(1 for _ in takewhile(spelling.control.__contains__, reversed(ids))) :]

    def _texts(self, rows: list[Row]) -> list[Encoded | Unusable]:
        encoded: list[Encoded | Unusable] = []
        for ours, theirs in zip(self.ours.documents(rows), self.theirs.documents(rows), strict=True):
            if isinstance(ours, Unusable):
                encoded.append(ours)
                continue
            assert not isinstance(theirs, Unusable), "whether a text can be read does not depend on the tokenizer"
            labels, their_labels = [IGNORE_INDEX, *ours[1:]], [IGNORE_INDEX, *theirs[1:]]
            pieces = list(self._pieces(ours, labels, theirs, their_labels))
            apart = Unusable("not aligned", self.align.apart(ours, labels, theirs, their_labels))
            encoded.append(Encoded(pieces) if pieces else apart)
        return encoded

    def _pieces(
        self, ids: list[int], labels: list[int], their_ids: list[int], their_labels: list[int]
    ) -> Iterator[Tokens]:
        """Yield consecutive pieces of a text that are short enough for both, each with one token of the one before."""
        chunks, their_chunks = self.align(ids, labels, their_ids, their_labels)
        count = int(chunks.max(initial=NONE)) + 1
        stops, their_stops = (_stops(c, count) for c in (chunks, their_chunks))
        begin, their_begin, first = 0, 0, 0
        while first < count:
            fit = np.searchsorted(stops, begin + self.ours.section.max_length, "right")
            their_fit = np.searchsorted(their_stops, their_begin + self.theirs.section.max_length, "right")
            last = int(min(fit, their_fit)) - 1
            if last >= first:
                stop, their_stop = int(stops[last]), int(their_stops[last])
                yield Tokens(
                    ids[begin:stop],
                    [IGNORE_INDEX, *labels[begin + 1 : stop]],
                    _columns(
                        _cut(chunks[begin:stop], first),
                        their_ids[their_begin:their_stop],
                        [IGNORE_INDEX, *their_labels[their_begin + 1 : their_stop]],
                        _cut(their_chunks[their_begin:their_stop], first),
                        [self.theirs.eos],
                    ),
                )
            else:  # a chunk that is longer than a sequence may be is left out
                last = first
            begin, their_begin, first = int(stops[last]) - 1, int(their_stops[last]) - 1, last + 1


def _columns(*values: Any) -> dict[str, Any]:
    return dict(zip((*COLUMNS, CLOSING), values, strict=True))


def teachers_section(section: DataSection) -> DataSection:
    """Return the section as it reads for the teacher."""
    return section.model_copy(
        update={
            "chat_template": section.teacher_chat_template,
            "max_length": section.teacher_max_length or section.max_length,
            "truncation": "right",
        }
    )


def _stops(chunks: Chunks, count: int) -> Chunks:
    """Return one past the last token of each chunk; tokens in none are passed over."""
    return np.searchsorted(np.maximum.accumulate(chunks), np.arange(count), "right")


def _cut(chunks: Chunks, first: int) -> Chunks:
    """Number the chunks of a piece from 0; the token it shares with the piece before is in none."""
    return np.where(chunks >= first, chunks - first, NONE)


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of two readings: the student's, and in it `theirs`, the teacher's.

    To what `Collator` makes it adds, in both, `chunks` `[batch, length]`: the chunk of each token, numbered over the
    whole batch, -1 where it is in none; and `bytes`, how many bytes of text the trained tokens of each sequence spell.
    Rows that come without the teacher's reading (the student's own text) are read here.

    Attributes:
        ours: lays out the student's reading.
        theirs: lays out the teacher's.
        tokenizer, teacher: the two tokenizers.
    """

    ours: Collator
    theirs: Collator
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase

    @cached_property
    def read(self) -> Reader:
        """What reads, for the teacher, rows that come without its reading."""
        return Reader(self.tokenizer, self.teacher)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        both = [row if "their_ids" in row else {**row, **self.read(row)} for row in rows]
        batch: dict[str, Any] = self.ours([_ours(row) for row in both])
        theirs = self.theirs([_theirs(row) for row in both])
        chunks, their_chunks = numbered_on(*([row[name] for row in both] for name in ("chunks", "their_chunks")))
        batch["chunks"] = self.ours.beside(chunks, batch, NONE)
        theirs["chunks"] = self.theirs.beside(their_chunks, theirs, NONE)
        spelling, trained = self.read.spelling, [part for row in both for part in _trained(row)]
        batch["bytes"] = torch.tensor([spelling.count(ids) for ids in trained])
        return batch | {"theirs": theirs}

    @property
    def spellings(self) -> tuple[Spelling, Spelling]:
        """What the tokens of the student's and of the teacher's tokenizer spell."""
        return self.read.spelling, spelling_of(self.teacher)


def _trained(row: dict[str, Any]) -> list[np.ndarray]:
    """Return the trained tokens of each sequence of a row."""
    ids, labels = (np.asarray(row[name], dtype=np.int64) for name in ("input_ids", "labels"))
    edges = np.cumsum(lengths_in(row))[:-1]
    parts = zip(np.split(ids, edges), np.split(labels != IGNORE_INDEX, edges), strict=True)
    return [part[mask] for part, mask in parts]


def _ours(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in COLUMNS}


def _theirs(row: dict[str, Any]) -> dict[str, Any]:
    lengths = {"seq_lengths": row["their_lengths"]} if "their_lengths" in row else {}
    beside = {name: row[name] for name in ("index", "domain", "weight") if name in row}
    return {"input_ids": row["their_ids"], "labels": row["their_labels"], **lengths, **beside}
