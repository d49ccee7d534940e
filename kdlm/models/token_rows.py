"""Rows of embedding and head for the tokens of another tokenizer, each a mean of rows that a model has.

A token that spells what an old one spells takes its row; bytes decide, never strings. A special token takes the row of
the one with its name, or else its role. Any other is the mean of the tokens that the old tokenizer splits it into: fast
vocabulary transfer (arXiv 2402.09977). FOCUS (arXiv 2305.14481) mixes similar tokens in place of those parts, by
vectors trained on text; by the model's own it was no better (docs/tokenizer_transfer.md).
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlm.spelling import Spelling

ROLES = {
    "eos": ("eos", "sep"),
    "bos": ("bos", "cls", "eos"),
    "cls": ("cls", "bos", "eos"),
    "sep": ("sep", "eos"),
    "unk": ("unk",),
    "mask": ("mask",),
    "pad": ("pad", "eos"),
}
"""Role of a special token -> whose row it takes, the first that the old tokenizer has. A token of two roles goes by the
first."""


@dataclass(frozen=True)
class TokenRows:
    """What each new row is made of.

    Attributes:
        parts: of each new id, the old rows that it is the mean of; a copy of one, the mean of all text of none.
        partners: new special token -> the old one in its place.
        text: the old rows of text.
    """

    parts: list[list[int]]
    partners: dict[int, int]
    text: list[int]

    def of(self, old: Float[Tensor, "old *rest"]) -> Float[Tensor, "new *rest"]:
        """Return the new rows of a weight or a bias. Copies are exact."""
        table = old.detach().float().view(len(old), -1)
        counts = torch.tensor([0, *(len(part) for part in self.parts)], device=old.device)
        rows = torch.tensor([row for part in self.parts for row in part], dtype=torch.long, device=old.device)
        new = torch.nn.functional.embedding_bag(rows, table, counts.cumsum(0)[:-1], mode="mean")
        new[counts[1:] == 0] = table[self.text].mean(0)
        return new.view(-1, *old.shape[1:]).to(old.dtype)


def token_rows(tokenizer: PreTrainedTokenizerBase, old: PreTrainedTokenizerBase, rows: int) -> TokenRows:
    """Return what the rows of `tokenizer` are made of, for a model of so many `rows` that reads with `old`."""
    ours, theirs = Spelling(tokenizer), Spelling(old)
    known = {i: piece for i, piece in enumerate(theirs.pieces[:rows]) if piece and i not in theirs.control}
    spelt = _first_of_each(known, old)
    partners = _partners(tokenizer, old, ours, theirs, rows)
    parts: list[list[int]] = []
    for new, piece in enumerate(ours.pieces):
        if new in partners:
            parts.append([partners[new]])
        elif new in ours.control or not piece:
            parts.append([])
        else:
            parts.append([spelt[piece]] if piece in spelt else _split(piece, theirs, known, spelt))
    return TokenRows(parts, partners, list(known))


def _first_of_each(known: dict[int, bytes], old: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """Return the id of each spelling; of several not that of a byte to fall back on, which text hardly has."""
    fallback = {i for token, i in old.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
    spelt: dict[bytes, int] = {}
    for number in sorted(known, key=lambda i: (i in fallback, i)):
        spelt.setdefault(known[number], number)
    return spelt


def _partners(
    tokenizer: PreTrainedTokenizerBase, old: PreTrainedTokenizerBase, ours: Spelling, theirs: Spelling, rows: int
) -> dict[int, int]:
    """Return which old special token each new one takes the row of: the one of its name, else of its role."""
    named = {theirs.pieces[i]: i for i in theirs.control if i < rows}
    found = {number: named[piece] for number in ours.control if (piece := ours.pieces[number]) in named}
    for role, candidates in ROLES.items():
        number: Any = getattr(tokenizer, f"{role}_token_id")
        those: list[Any] = [getattr(old, f"{candidate}_token_id") for candidate in candidates]
        partner = next((i for i in those if i is not None and i < rows), None)
        if number is not None and partner is not None:
            found.setdefault(number, partner)
    return found


def _split(piece: bytes, old: Spelling, known: Container[int], spelt: dict[bytes, int]) -> list[int]:
    """Return the old tokens that spell a piece: as the old tokenizer reads it, else the longest ones from its left.

    A tokenizer cannot read a piece that is not whole letters, or on its own terms only: with a space before it.
    """
    try:
        read = old.ids(piece.decode())
    except UnicodeDecodeError:
        read = []
    if all(token in known for token in read) and old.text(read) == piece:
        return read
    found: list[int] = []
    begin = 0
    while begin < len(piece):
        stop = next((s for s in range(len(piece), begin, -1) if piece[begin:s] in spelt), None)
        if stop is not None:
            found.append(spelt[piece[begin:stop]])
        begin = begin + 1 if stop is None else stop
    return found
