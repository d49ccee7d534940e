"""Rows of embedding and head for the tokens of another tokenizer, each a mixture of the rows that a model has.

A token that spells what an old one spells takes its row; bytes decide, never strings. A special token takes the row of
the one with its name, or else its role. Any other is a mixture:

- `fvt`: the mean of the tokens that the old tokenizer splits it into (fast vocabulary transfer, arXiv 2402.09977).
- `focus`: tokens that both have, weighted by the sparsemax of their similarity to it (FOCUS, arXiv 2305.14481). The
  paper measures similarity in fastText vectors trained on new text; here it is the cosine to the `fvt` mean among the
  model's own input embeddings, which takes no text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

AT_ONCE = 1024
"""Tokens that are compared with all shared ones at a time."""

Mixture = list[tuple[int, float]]
"""Ids of old rows and their weights, which sum to 1; empty for the mean of all rows of text."""


@dataclass(frozen=True)
class TokenRows:
    """What each new row is made of.

    Attributes:
        mixtures: of each new id, the old rows and their weights; one of weight 1 is a copy.
        shared: the new ids of text whose bytes an old token spells.
        partners: new special token -> the old one in its place.
        text: the old rows of text.
    """

    mixtures: list[Mixture]
    shared: list[int]
    partners: dict[int, int]
    text: list[int]

    def of(self, old: Float[Tensor, "old *rest"]) -> Float[Tensor, "new *rest"]:
        """Return the new rows of a weight or a bias. Copies are exact."""
        entries = [(new, row, weight) for new, mixture in enumerate(self.mixtures) for row, weight in mixture]
        new, row, weight = zip(*entries, strict=True)
        mixing = torch.sparse_coo_tensor(
            torch.tensor([new, row]), torch.tensor(weight), (len(self.mixtures), len(old)), check_invariants=True
        )
        flat = old.detach().float().view(len(old), -1)
        rows = torch.sparse.mm(mixing.to(old.device), flat)
        rows[[new for new, mixture in enumerate(self.mixtures) if not mixture]] = flat[self.text].mean(0)
        return rows.view(-1, *old.shape[1:]).to(old.dtype)


def token_rows(
    tokenizer: PreTrainedTokenizerBase,
    old: PreTrainedTokenizerBase,
    embeddings: Float[Tensor, "old width"],
    initialisation: Literal["fvt", "focus"] = "fvt",
) -> TokenRows:
    """Return what the rows of `tokenizer` are made of, from the input embeddings of a model that reads with `old`."""
    ours, theirs = Spelling(tokenizer), Spelling(old)
    rows = embeddings.shape[0]
    known = {i: piece for i, piece in enumerate(theirs.pieces[:rows]) if piece and i not in theirs.control}
    spelt = _first_of_each(known, old)
    partners = _partners(tokenizer, old, ours, theirs, rows)
    mixtures: list[Mixture] = []
    shared, others = [], []
    for new, piece in enumerate(ours.pieces):
        if new in partners:
            mixtures.append([(partners[new], 1.0)])
        elif new in ours.control or not piece:
            mixtures.append([])
        elif piece in spelt:
            mixtures.append([(spelt[piece], 1.0)])
            shared.append(new)
        else:
            split = _split(piece, theirs, spelt)
            mixtures.append(_mean(split))
            others.append(new)
    found = TokenRows(mixtures, shared, partners, list(known))
    if initialisation == "focus" and shared and others:
        anchors = sorted({found.mixtures[new][0][0] for new in shared})
        for new, mixture in zip(others, _similar(found, others, anchors, embeddings), strict=True):
            mixtures[new] = mixture
    return found


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


def _split(piece: bytes, old: Spelling, spelt: dict[bytes, int]) -> list[int]:
    """Return the old tokens that spell a piece: as the old tokenizer reads it, else the longest ones from its left.

    A tokenizer cannot read a piece that is not whole letters, or on its own terms only: with a space before it.
    """
    try:
        read = old.ids(piece.decode())
    except UnicodeDecodeError:
        read = []
    if read and old.text(read) == piece:
        return read
    found: list[int] = []
    begin = 0
    while begin < len(piece):
        stop = next((s for s in range(len(piece), begin, -1) if piece[begin:s] in spelt), None)
        if stop is not None:
            found.append(spelt[piece[begin:stop]])
        begin = begin + 1 if stop is None else stop
    return found


def _mean(ids: Sequence[int]) -> Mixture:
    return [(i, ids.count(i) / len(ids)) for i in dict.fromkeys(ids)]


def _similar(
    found: TokenRows, others: list[int], anchors: list[int], embeddings: Float[Tensor, "old width"]
) -> Iterator[Mixture]:
    """Yield, of each token that is not shared, the shared rows and their sparsemax weights."""
    old = embeddings.detach().float()
    guesses = torch.nn.functional.normalize(found.of(old)[others], dim=-1)
    known = torch.nn.functional.normalize(old[anchors], dim=-1)
    for some in guesses.split(AT_ONCE):
        for weights in sparsemax(some @ known.T):
            chosen = weights.nonzero().flatten().tolist()
            yield [(anchors[i], weights[i].item()) for i in chosen]


def sparsemax(scores: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Return the nearest point of the simplex to each row (arXiv 1602.02068, algorithm 1): most weights are 0."""
    ordered = scores.sort(dim=-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    above = ordered.cumsum(-1) - 1
    size = (count * ordered > above).sum(-1, keepdim=True)
    threshold = above.gather(-1, size - 1) / size
    return (scores - threshold).clamp(min=0)
