"""Outcome-chunk debiasing: chunks that end where a word may end, and say so (arXiv 2503.20083, and its code).

What follows a chunk is not free. A tokenizer that has a token for `hello` never writes `hell` and `o`, so a model that
wrote `hell` as a token of its own has said that no `o` follows, and its probability of `hell` is that of fewer texts
than the other model's. After a chunk at whose end a new word begins both mean the same. So a chunk ends only where the
teacher gives that a probability above a threshold, else it is merged with the next; and that a word begins is part of
what the chunk's probability is of, for both.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kdlm.losses import token_log_probs
from kdlm.methods.cross_tokenizer.aligned import Readings
from kdlm.signal import Dense, Hidden, Rows, take
from kdlm.spelling import Spelling


def word_starts(spelling: Spelling) -> Int[Tensor, "ids"]:
    """Return the tokens before which a word ends: those that begin with a space, tab or newline, and control tokens."""
    return torch.tensor(
        [
            number
            for number, piece in enumerate(spelling.pieces)
            if number in spelling.control or (piece and piece[:1] in b" \t\n")
        ]
    )


def log_mass(signal: Hidden | Dense, ids: Int[Tensor, "ids"], **options) -> Float[Tensor, "rows"]:
    """Return the logarithm of the probability that some tokens have together, on each row.

    By one of them: its probability over its share among them.
    """
    one = ids.new_zeros(len(signal.hidden if isinstance(signal, Hidden) else signal.logits))
    if isinstance(signal, Hidden):
        head = signal.head.whole()
        few = replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])
        among: Hidden | Dense = Hidden(signal.hidden, few)
    else:
        among = Dense(signal.logits[:, ids])
    whole = token_log_probs(signal, one + ids[0], **options)[0]
    return (whole - token_log_probs(among, one, **options)[0]).clamp(max=0.0)


@dataclass(frozen=True)
class Merged:
    """Chunks that end where a word may end.

    Attributes:
        readings: the same, their chunks merged and numbered anew.
        size: of how many chunks each is made.
        student, teacher: log-probability that a word begins behind it; 0 where nothing is said of what follows, at the
            end of a text.
    """

    readings: Readings
    size: Int[Tensor, "chunks"]
    student: Float[Tensor, "chunks"]
    teacher: Float[Tensor, "chunks"]


def merged(
    readings: Readings, starts: Int[Tensor, "ids"], their_starts: Int[Tensor, "their_ids"], threshold: float, **options
) -> Merged:
    """Merge chunks behind which the teacher finds the beginning of a word no likelier than `threshold`.

    Raises ValueError for a teacher that gives no whole distribution.
    """
    teacher = readings.teacher
    if not isinstance(teacher, Hidden | Dense):
        raise ValueError(
            f"debias: the probability that a word ends is a sum over the teacher's vocabulary, which a "
            f"{type(teacher).__name__} signal does not give; leave it out, or take a teacher of whole distributions"
        )
    last, their_last = readings.ends()
    rows, their_rows = readings.rows, readings.their_rows
    follows = _follows(rows, last) & _follows(their_rows, their_last)
    at = follows.nonzero()[:, 0]
    said = log_mass(take(readings.student, last[at] + 1), starts.to(at.device), **options)
    with torch.no_grad():
        meant = log_mass(take(teacher, their_last[at] + 1), their_starts.to(at.device), **options)
    stays_open = follows.clone()
    stays_open[at] = (
        (meant.exp() <= threshold)
        & (readings.chunks[last[at] + 1] == at + 1)
        & (readings.their_chunks[their_last[at] + 1] == at + 1)
    )
    group = torch.cumsum(~stays_open, 0) - (~stays_open).long()  # what is behind an open one is of its group
    of_chunk = torch.cat([group, group.new_full((1,), -1)])  # -1 of a token in none finds the last place
    closing = group.where(~stays_open, readings.size)[at]
    return Merged(
        replace(readings, chunks=of_chunk[readings.chunks], their_chunks=of_chunk[readings.their_chunks]),
        _summed(torch.ones_like(group), group, readings.size),
        _summed(said, closing, readings.size),
        _summed(meant, closing, readings.size),
    )


def _summed(values: Tensor, groups: Int[Tensor, "values"], size: int) -> Tensor:
    return values.new_zeros(size + 1).index_add(0, groups, values)[:size]


def _follows(rows: Rows, last: Int[Tensor, "chunks"]) -> Bool[Tensor, "chunks"]:
    """Return after which of these rows the next one is of the next token of the same text."""
    behind = (last + 1).clamp(max=max(0, len(rows) - 1))
    return (rows.index[behind] == rows.index[last] + 1) & (behind == last + 1)
