"""Byte order: the tokens of a vocabulary sorted by what they spell, so that those which begin alike stand together."""

from bisect import bisect_left, bisect_right

import numpy as np
from jaxtyping import Int

from kdlm.spelling import Spelling

BYTES = 256


class ByteOrder:
    """The text tokens of a tokenizer in the order of their bytes.

    Attributes:
        ids: their ids, in that order.
    """

    def __init__(self, spelling: Spelling):
        text = [(piece, i) for i, piece in enumerate(spelling.pieces) if piece and i not in spelling.control]
        self._pieces = [piece for piece, _ in sorted(text)]
        self.ids = np.array([i for _, i in sorted(text)], dtype=np.int64)
        self._known: dict[bytes, np.ndarray] = {}

    def continuations(self, prefix: bytes) -> Int[np.ndarray, "257"]:
        """Return the places of the tokens that begin with `prefix` and go on: those with byte v next begin at the v-th
        of these places and end before the next one. A token that is the prefix itself is not among them."""
        if prefix not in self._known:
            first = bisect_right(self._pieces, prefix) if prefix else 0
            last = bisect_left(self._pieces, _after(prefix)) if prefix.strip(b"\xff") else len(self._pieces)
            following = [piece[len(prefix)] for piece in self._pieces[first:last]]
            self._known[prefix] = first + np.searchsorted(following, np.arange(BYTES + 1))
        return self._known[prefix]


def letters_of(spelling: Spelling) -> dict[bytes, int]:
    """Return the id of what each text token spells."""
    return {piece: i for i, piece in enumerate(spelling.pieces) if piece and i not in spelling.control}


def is_of_bytes(spelling: Spelling) -> bool:
    """Whether the text tokens of a tokenizer are the 256 bytes and no others."""
    letters = letters_of(spelling)
    return len(letters) == BYTES and all(len(piece) == 1 for piece in letters)


def _after(prefix: bytes) -> bytes:
    """Return the first bytes, in their order, behind all that begin with a prefix."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1])
