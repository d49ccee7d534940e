"""Alignment: which tokens of two readings of one text stand for the same bytes.

A chunk is a minimal span of bytes whose two ends are token boundaries in both readings. Chunks are numbered in the
order of the text; a token that is in none has -1. Only answers (what is trained on) are aligned: prompts are rendered
by each side's own template and may differ. The tokens that end a turn or a text on both sides are a chunk of their own,
of no bytes: they say the same thing in two alphabets. Where only one side has them they are in none.

Templates may write more around an answer, spaces or an empty thought, and either reading may be cut. Nothing is
guessed: where two readings do not spell the same text, from where one begins up to where one ends, an answer is not
aligned at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from kdlm.signal import IGNORE_INDEX
from kdlm.spelling import Ids, Spelling

NONE = -1
"""The chunk of a token that is in none."""

Chunks = Int[np.ndarray, "_"]

ENOUGH = 32
"""Bytes by which the beginning of an answer that was cut is found after what the other template writes before it."""


@dataclass(frozen=True)
class Aligner:
    """Aligns readings of one text by two tokenizers.

    Attributes:
        ours, theirs: what the tokens of the student and of the teacher spell.

    Raises ValueError where neither tokenizer gives back the text that it reads.
    """

    ours: Spelling
    theirs: Spelling

    def __post_init__(self) -> None:
        if not self.ours.exact and not self.theirs.exact:
            raise ValueError(
                "neither the student's nor the teacher's tokenizer gives back the text that it reads (lower case, "
                "normalisation, spaces left out), so their tokens cannot be aligned: take a teacher whose tokenizer "
                "does, or train on its text with sequence_kd"
            )

    def __call__(self, ids: Ids, labels: Ids, their_ids: Ids, their_labels: Ids) -> tuple[Chunks, Chunks]:
        """Return the chunk of every token of either reading, numbered from 0 without gaps.

        Labels say which tokens are trained on: each run of them is an answer, and the answers of both readings are
        matched in their order. The first token of a sequence is never trained on; where both readings are answers from
        the second one on, it belongs to their text. A chunk with a token that is not trained on is none, as is one with
        a control token on one side only: there, the other side reads its name as text.
        """
        ids, their_ids = np.asarray(ids, dtype=np.int64), np.asarray(their_ids, dtype=np.int64)
        trained, their_trained = np.asarray(labels) != IGNORE_INDEX, np.asarray(their_labels) != IGNORE_INDEX
        control, their_control = self.ours.is_control(ids), self.theirs.is_control(their_ids)
        chunks, their_chunks = np.full(len(ids), NONE), np.full(len(their_ids), NONE)
        count, whole = 0, bool(trained[1:2].any() and their_trained[1:2].any())
        pairs = zip(_answers(trained, control, whole), _answers(their_trained, their_control, whole), strict=False)
        for (mine, closing), (their, their_closing) in pairs:
            closed = closing.start < closing.stop and their_closing.start < their_closing.stop
            shared = self._shared(ids[mine], their_ids[their], closed)
            if shared is None:
                continue
            chunks[mine], their_chunks[their], size = shared.chunks(count)
            count += size
            if closed and shared.to_the_end:
                chunks[closing], their_chunks[their_closing] = count, count
                count += 1
        if not count:
            return chunks, their_chunks
        dropped = _holding(chunks, control, count) ^ _holding(their_chunks, their_control, count)
        return without(chunks, ~trained, their_chunks, ~their_trained, dropped)

    def apart(self, ids: Ids, labels: Ids, their_ids: Ids, their_labels: Ids) -> str:
        """Say how the first answers of two readings that are not aligned begin."""
        texts = []
        for spelling, some, marks in ((self.ours, ids, labels), (self.theirs, their_ids, their_labels)):
            trained = np.asarray(marks) != IGNORE_INDEX
            spans = [span for span, _ in _answers(trained, spelling.is_control(some), bool(trained[1:2].any()))]
            some = np.asarray(some)[spans[0]] if spans else np.asarray([], dtype=np.int64)
            texts.append((spelling.text(some[: spelling.known(some)]) or b"")[:40].decode(errors="replace"))
        return f"the student reads {texts[0]!r}, the teacher {texts[1]!r}"

    def _shared(self, ids: np.ndarray, their_ids: np.ndarray, closed: bool) -> "Shared | None":
        """Return where each token ends in the text that both spell; None if they do not spell one."""
        spelt = self._spelt(ids, their_ids, closed)
        if spelt is not None and spelt.late == (False, False) and self.ours.exact and self.theirs.exact:
            return spelt
        return self._read(ids, their_ids) or spelt

    def _spelt(self, ids: np.ndarray, their_ids: np.ndarray, closed: bool) -> "Shared | None":
        """Compare the bytes of the tokens."""
        text, other = self.ours.text(ids), self.theirs.text(their_ids)
        starts = None if text is None or other is None else overlap(text, other, closed)
        if text is None or other is None or starts is None:
            return None
        start, their_start = starts
        size = min(len(text) - start, len(other) - their_start)
        rest = text[start + size :] + other[their_start + size :]
        ends, their_ends = self.ours.ends(ids) - start, self.theirs.ends(their_ids) - their_start
        return Shared(ends, their_ends, size, not rest.strip(), late=(start > 1, their_start > 1))

    def _read(self, ids: np.ndarray, their_ids: np.ndarray) -> "Shared | None":
        """Have the tokenizer of one reading read what the other, an exact one, spells: it must give the same tokens."""
        if self.theirs.exact and (shared := _reread(self.ours, ids, self.theirs, their_ids)) is not None:
            return shared
        if self.ours.exact and (shared := _reread(self.theirs, their_ids, self.ours, ids)) is not None:
            return Shared(shared.their_ends, shared.ends, shared.size, shared.to_the_end)
        return None


@dataclass(frozen=True)
class Shared:
    """A text that two readings share, and where their tokens end in it.

    Attributes:
        ends, their_ends: in bytes from where the shared text begins.
        size: of the shared text, in bytes.
        to_the_end: whether neither reading says more after it.
        late: whether either reading says more before it than the space that SentencePiece writes.
    """

    ends: Int[np.ndarray, "tokens"]
    their_ends: Int[np.ndarray, "their_tokens"]
    size: int
    to_the_end: bool
    late: tuple[bool, bool] = (False, False)

    def chunks(self, first: int) -> tuple[Chunks, Chunks, int]:
        """Return the chunk of each token, numbered from `first`, and how many there are."""
        border = _marked(self.ends, self.size) & _marked(self.their_ends, self.size)
        number = np.cumsum(border)  # of the chunk that holds the byte at a place
        count = int(number[-1])
        sides = list(zip((self.ends, self.their_ends), self.late, strict=True))
        # 1 where a token reaches into the first chunk from before the shared text
        dropped = int(any(late and not (ends == 0).any() for ends, late in sides))
        numbers = []
        for ends, late in sides:
            found = number[np.clip(ends - 1, 0, self.size)]
            inside = (found >= dropped) & (found < count) & (ends <= self.size) & ((ends > 0) | (not late))
            numbers.append(np.where(inside, found - dropped + first, NONE))
        return numbers[0], numbers[1], max(count - dropped, 0)


def overlap(text: bytes, other: bytes, closed: bool) -> tuple[int, int] | None:
    """Return where the text that both share begins in either: up to its end in one of them, both if they are `closed`.

    One may begin with a space more, as SentencePiece's do, or with whatever its template writes before an answer.
    """
    starts = [(0, 0), *([(1, 0)] if text[:1] == b" " else []), *([(0, 1)] if other[:1] == b" " else [])]
    for start, their_start in starts:
        if len(text) - start == len(other) - their_start and text[start:] == other[their_start:]:
            return start, their_start
    if not text.strip() or not other.strip():
        return None  # spaces alone do not say which of the other's they are
    for start, their_start in starts:
        if _agree(text[start:], other[their_start:]):
            return start, their_start
    if (found := _found(text, other, closed)) is not None:
        return found
    return None if (found := _found(other, text, closed)) is None else (found[1], found[0])


def _agree(text: bytes, other: bytes) -> bool:
    return text.startswith(other) or other.startswith(text)


def _found(text: bytes, longer: bytes, closed: bool) -> tuple[int, int] | None:
    """Return where a text and a longer one, which begins with something else, become the same."""
    core, whole = text.strip(), longer.rstrip()
    start = len(text) - len(text.lstrip())
    if closed and core and whole.endswith(core):
        at = len(whole) - len(core)
    elif len(core) >= ENOUGH and longer.count(core[:ENOUGH]) == 1:
        at = longer.index(core[:ENOUGH])
        if not _agree(text[start:], longer[at:]):
            return None
    else:
        return None
    while start and at and text[start - 1] == longer[at - 1]:
        start, at = start - 1, at - 1
    return start, at


def _reread(spelling: Spelling, ids: np.ndarray, exact: Spelling, exact_ids: np.ndarray) -> "Shared | None":
    """Return where tokens end in the text that another reading spells, if their tokenizer reads it as these tokens."""
    text = exact.text(exact_ids)
    if text is None:
        return None
    for skipped in (1, 0) if exact.begins_with_space and text[:1] == b" " else (0,):
        ends = spelling.ends_in(text[skipped:], ids)
        if ends is not None:
            size = int(ends[ends + skipped <= len(text)].max(initial=0))
            return Shared(ends, exact.ends(exact_ids) - skipped, size, size + skipped == len(text))
    return None


def numbered_on(chunks: Sequence[Ids], their_chunks: Sequence[Ids]) -> tuple[list[Chunks], list[Chunks]]:
    """Return the chunks of several sequences, given both readings of each, numbered over all of them."""
    starts = np.cumsum([0, *(int(np.max(one, initial=NONE)) + 1 for one in chunks)])[:-1]

    def moved(side: Sequence[Ids]) -> list[Chunks]:
        return [
            np.where(one == NONE, NONE, one + start) for one, start in zip(map(np.asarray, side), starts, strict=True)
        ]

    return moved(chunks), moved(their_chunks)


def count_answers(labels: Ids) -> int:
    """Return the number of answers in a sequence: runs of tokens that are trained on."""
    return int(np.diff(np.asarray(labels) != IGNORE_INDEX, prepend=False, append=False).sum()) // 2


def _answers(trained: np.ndarray, control: np.ndarray, whole: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the tokens of each answer that are text, and those that close it; `whole` if the first token is of one."""
    answered = np.concatenate([trained[:1] | whole, trained[1:]])
    edges = np.flatnonzero(answered[1:] != answered[:-1]) + 1
    edges = [*([0] if answered[:1].any() else []), *edges.tolist(), *([len(answered)] if answered[-1:].any() else [])]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        text = np.flatnonzero(~control[start:stop])
        begin, end = (start + int(text[0]), start + int(text[-1]) + 1) if len(text) else (start, start)
        yield slice(begin, end), slice(end, stop)


def _marked(ends: np.ndarray, size: int) -> Bool[np.ndarray, "places"]:
    """Return at which places of a text tokens end."""
    marks = np.zeros(size + 1, dtype=bool)
    marks[ends[(ends > 0) & (ends <= size)]] = True
    return marks


def _holding(chunks: Chunks, marked: Bool[np.ndarray, "tokens"], count: int) -> Bool[np.ndarray, "chunks"]:
    """Return which chunks hold a marked token; the place after the last one is of tokens in none."""
    holding = np.zeros(count + 1, dtype=bool)
    holding[chunks[marked]] = True
    return holding


def without(
    chunks: Chunks,
    marked: Bool[np.ndarray, "tokens"],
    their_chunks: Chunks,
    their_marked: Bool[np.ndarray, "their_tokens"],
    dropped: Bool[np.ndarray, "chunks"] | Literal[False] = False,
) -> tuple[Chunks, Chunks]:
    """Leave out the chunks that hold a marked token of either reading, and `dropped` ones; number the others anew."""
    count = int(max(chunks.max(initial=NONE), their_chunks.max(initial=NONE))) + 1
    dropped = dropped | _holding(chunks, marked, count) | _holding(their_chunks, their_marked, count)
    return _without(dropped, chunks), _without(dropped, their_chunks)


def _without(dropped: Bool[np.ndarray, "chunks"], chunks: Chunks) -> Chunks:
    if not dropped[:-1].any():
        return chunks
    number = np.where(dropped, NONE, np.cumsum(~dropped) - 1)
    number[NONE] = NONE
    return number[chunks]
