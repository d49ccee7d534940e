"""Paired vocabulary: which ids of two vocabularies mean the same, and which teacher tokens a student token leads to.

By what tokens spell, in bytes, and never by token strings. Control tokens spell nothing and pair by their role: the
end of a sequence with the end of a sequence, the others with the one of the same name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from kdlm.signal import Signal
from kdlm.spelling import Spelling

Ids = Int[np.ndarray, "ids"]


@dataclass(frozen=True)
class PairedVocabulary:
    """What the tokens of a student's and a teacher's tokenizer have in common.

    Attributes:
        ours, theirs: what the tokens of either tokenizer spell.
    """

    ours: Spelling
    theirs: Spelling

    @cached_property
    def matched(self) -> tuple[Ids, Ids]:
        """The student's ids that mean what a teacher's id means, rising, and that id of each: one to one.

        Where several ids of a tokenizer spell the same bytes (byte fallback: `<0x41>` and `A`), the plain one counts.
        """
        theirs = _by_bytes(self.theirs)
        pairs = {number: theirs[piece] for piece, number in _by_bytes(self.ours).items() if piece in theirs}
        pairs |= self._control()
        ids = sorted(pairs)
        return np.array(ids, dtype=np.int64), np.array([pairs[i] for i in ids], dtype=np.int64)

    def tokens(self, student: Signal, teacher: Signal) -> tuple[int, int]:
        """Return how many ids of either side are tokens and rows of a head too, which may be padded."""
        sizes = [len(side.pieces) for side in (self.ours, self.theirs)]
        rows = [getattr(signal, "vocab_size", size) for signal, size in zip((student, teacher), sizes, strict=True)]
        return min(sizes[0], rows[0]), min(sizes[1], rows[1])

    @cached_property
    def share(self) -> float:
        """The share of the teacher's tokens that the student has too."""
        return len(self.matched[0]) / max(1, sum(_known(self.theirs)))

    def projection(self, k: int) -> tuple[Ids, Ids, Float[np.ndarray, "entries"]]:
        """Return student ids, teacher ids and weights: where the probability of a student's token goes.

        Both have read the same text, and the student says that a token v is next. What the teacher then says next is
        a token t that agrees with v: one begins with the bytes of the other. A row of weights is `P(t | v)` as far as
        the two vocabularies tell, by these rules (with the sides exchanged it carries the teacher's probabilities):

        - a token that the teacher has too leads to it alone, with weight 1;
        - of a longer one, the teacher says the longest of its tokens that begins v, as a tokenizer of longest matches
          would: exact where its reading of v and whatever follows begins so;
        - or it says a longer token, of which v is the longest of the student's that begins it.

        These candidates are equally likely, since nothing here knows text; `k` of them are kept, the lowest ids, which
        a tokenizer gives to what is frequent. What the others had is lost to the row, as is all of a row without
        candidates (control tokens of one side): rows add up to at most 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        exact = dict(zip(*(side.tolist() for side in self.matched), strict=True))
        candidates: dict[int, set[int]] = {number: {other} for number, other in exact.items()}
        ours, theirs = _by_bytes(self.ours), _by_bytes(self.theirs)
        for piece, number in _spelt(self.ours):
            if number not in exact and (begun := _longest(piece, theirs)) is not None:
                candidates.setdefault(number, set()).add(begun)
        taken = set(exact.values())
        for piece, number in _spelt(self.theirs):
            begun = None if number in taken else _longest(piece, ours)
            if begun is not None and begun not in exact:
                candidates.setdefault(begun, set()).add(number)
        entries = [(v, t, 1 / len(found)) for v, found in sorted(candidates.items()) for t in sorted(found)[:k]]
        rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
        return np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64), np.array(weights, dtype=np.float64)

    def _control(self) -> dict[int, int]:
        """Pair control tokens: the ends of a sequence, then those of one name."""
        pairs: dict[int, int] = {}
        eos, other = self.ours.tokenizer.eos_token_id, self.theirs.tokenizer.eos_token_id
        if isinstance(eos, int) and isinstance(other, int):
            pairs[eos] = other
        names = {self.theirs.tokenizer.convert_ids_to_tokens(i): i for i in sorted(self.theirs.control)}
        for number in sorted(self.ours.control - pairs.keys()):
            named = names.get(self.ours.tokenizer.convert_ids_to_tokens(number))
            if named is not None and named not in pairs.values():
                pairs[number] = named
        return pairs


def _known(spelling: Spelling) -> Iterable[bool]:
    """Say of each id whether it is a token at all, and not a row of padding."""
    return (piece is not None or number in spelling.control for number, piece in enumerate(spelling.pieces))


def _spelt(spelling: Spelling) -> Iterable[tuple[bytes, int]]:
    """Return the bytes and the number of every token of text."""
    for number, piece in enumerate(spelling.pieces):
        if piece and number not in spelling.control:
            yield piece, number


def _by_bytes(spelling: Spelling) -> dict[bytes, int]:
    """Return the id that spells some bytes, of several the one whose token string is the shortest."""
    found: dict[bytes, int] = {}
    string = spelling.tokenizer.convert_ids_to_tokens
    for piece, number in _spelt(spelling):
        if piece not in found or len(string(number)) < len(string(found[piece])):
            found[piece] = number
    return found


def _longest(piece: bytes, tokens: dict[bytes, int]) -> int | None:
    """Return the longest token that begins a piece, None where there is none."""
    return next((tokens[piece[:n]] for n in range(len(piece), 0, -1) if piece[:n] in tokens), None)
