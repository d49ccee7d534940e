"""Alignment: which tokens of two readings of one text stand for the same bytes.

A chunk is a minimal span of bytes whose two ends are token boundaries in both readings. Chunks are numbered in the
order of the text; a token that is in none has -1. Only what is trained on is aligned: prompts are rendered by each
side's own template and may differ. The tokens that end a turn or a text on both sides are a chunk of their own, of no
bytes: they say the same thing in two alphabets. Where only one side has them they are in none.

Nothing is guessed: where two readings do not spell the same text, from its beginning or up to its end, they are not
aligned at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from kdlm.signal import IGNORE_INDEX
from kdlm.spelling import Spelling

NONE = -1
"""The chunk of a token that is in none."""

Chunks = Int[np.ndarray, "tokens"]


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

    def __call__(
        self, ids: Sequence[int], labels: Sequence[int], their_ids: Sequence[int], their_labels: Sequence[int]
    ) -> tuple[Chunks, Chunks]:
        """Return the chunk of every token of either reading, numbered from 0 without gaps.

        Labels say which tokens are trained on. The first token of a sequence never is, but belongs to its text; a
        chunk with a token that is not trained on is none.
        """
        chunks, their_chunks = np.full(len(ids), NONE), np.full(len(their_ids), NONE)
        count = 0
        ours, theirs = self._runs(self.ours, ids, labels), self._runs(self.theirs, their_ids, their_labels)
        for run, other in zip(ours, theirs, strict=False):
            mine, closing = _opened(self.ours, ids, run)
            their, their_closing = _opened(self.theirs, their_ids, other)
            matched = self._matched(ids[mine], their_ids[their])
            if matched is None:
                continue
            chunks[mine], their_chunks[their], size = matched.chunks(count)
            count += size
            if closing.start < closing.stop and their_closing.start < their_closing.stop:
                chunks[closing], their_chunks[their_closing] = count, count
                count += 1
        return _kept(chunks, np.asarray(labels), their_chunks, np.asarray(their_labels), count)

    def _runs(self, spelling: Spelling, ids: Sequence[int], labels: Sequence[int]) -> Iterator[slice]:
        """Yield the runs of trained tokens, the first with what begins the text."""
        trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
        for run in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1) if len(trained) else ():
            begin = 0 if run[0] == 1 and ids[0] not in spelling.control else int(run[0])
            yield slice(begin, int(run[-1]) + 1)

    def _matched(self, ids: Sequence[int], their_ids: Sequence[int]) -> "Matched | None":
        """Return where each token ends in the text that both spell; None if they do not spell one."""
        text = self.ours.text(ids) if self.ours.exact else None
        other = self.theirs.text(their_ids) if self.theirs.exact else None
        if text is None:
            ends = None if other is None else self.ours.ends_in(other, ids)
            return None if ends is None else Matched(ends, self.theirs.ends(their_ids))
        if other is None:
            ends = self.theirs.ends_in(text, their_ids)
            return None if ends is None else Matched(self.ours.ends(ids), ends)
        ends, their_ends = self.ours.ends(ids), self.theirs.ends(their_ids)
        if text == other:
            return Matched(ends, their_ends)
        space, their_space = text.startswith(b" "), other.startswith(b" ")  # SentencePiece puts one before a text
        bare, other_bare = text[space:], other[their_space:]
        short = min(bare, other_bare, key=len)
        if not short:
            return None
        if bare.startswith(short) and other_bare.startswith(short):  # the other one may have been cut
            return Matched(ends - space, their_ends - their_space)
        if bare.endswith(short) and other_bare.endswith(short):  # one template begins with more, an empty thought
            return Matched(ends - (len(text) - len(short)), their_ends - (len(other) - len(short)), late=True)
        return None


@dataclass(frozen=True)
class Matched:
    """Where the tokens of two readings end, in bytes of the text that they share, which begins at 0.

    Attributes:
        late: whether a reading begins before the shared text, with tokens of its own.
    """

    ends: Int[np.ndarray, "tokens"]
    their_ends: Int[np.ndarray, "their_tokens"]
    late: bool = False

    def chunks(self, first: int) -> tuple[Chunks, Chunks, int]:
        """Return the chunk of each token, numbered from `first`, and how many there are."""
        shared = np.intersect1d(self.ends, self.their_ends)
        shared = shared[shared > 0]
        ours, theirs = (self._numbers(values, shared) for values in (self.ends, self.their_ends))
        if self.late and not (self._begins(self.ends) and self._begins(self.their_ends)):
            ours, theirs, shared = ours - 1, theirs - 1, shared[1:]  # a token reaches into the first chunk
        return *(np.where(values < 0, NONE, values + first) for values in (ours, theirs)), len(shared)  # type: ignore

    def _numbers(self, ends: np.ndarray, shared: np.ndarray) -> np.ndarray:
        found = np.searchsorted(shared, ends)
        return np.where((found < len(shared)) & ((ends > 0) | (not self.late)), found, NONE)

    @staticmethod
    def _begins(ends: np.ndarray) -> bool:
        """Whether a token ends where the shared text begins, or none does before it."""
        return bool((ends == 0).any() or (ends > 0).all())


def _opened(spelling: Spelling, ids: Sequence[int], run: slice) -> tuple[slice, slice]:
    """Return the tokens of a run that are text, and those that close it."""
    stop = run.stop
    while stop > run.start and ids[stop - 1] in spelling.control:
        stop -= 1
    return slice(run.start, stop), slice(stop, run.stop)


def _kept(
    chunks: Chunks, labels: np.ndarray, their_chunks: Chunks, their_labels: np.ndarray, count: int
) -> tuple[Chunks, Chunks]:
    """Leave out the chunks with a token that is not trained on, and number the others anew."""
    kept = np.ones(count + 1, dtype=bool)  # the last place is that of NONE
    kept[chunks[labels == IGNORE_INDEX]] = False
    kept[their_chunks[their_labels == IGNORE_INDEX]] = False
    kept[NONE] = False
    number = np.where(kept, np.cumsum(kept) - 1, NONE)
    return number[chunks], number[their_chunks]
