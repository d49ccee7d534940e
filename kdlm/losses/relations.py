"""Relations between the positions of a text: attention, and what queries, keys or values have to do with one another.

A relation of x and y is `softmax(x y^T / sqrt(size))` of each head: with queries and keys it is the attention of the
model, if they come as it multiplies them, rotary positions and all. Sequences are laid out apart, and positions of two
of them have no relation; neither has padding any, nor a token with one behind it where `causal`. What is kept of a
sequence grows with the square of its length, so heads are compared some at a time, and computed again on the way back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdlm.losses.distributions import widen
from kdlm.signal import Rows, sequence_of

Heads = Float[Tensor, "sequences heads length size"]
AT_ONCE = 2**24
"""Numbers of one `[heads, length, length]` tensor."""


@dataclass(frozen=True)
class Apart:
    """Where rows of a batch are once each sequence has a line of its own.

    Attributes:
        sequence, place: of each row.
        real: where there is a row.
    """

    sequence: Int[Tensor, "rows"]
    place: Int[Tensor, "rows"]
    real: Bool[Tensor, "sequences length"]

    @classmethod
    def of(cls, batch: dict[str, Tensor], rows: Rows) -> "Apart":
        """Lay out rows, which are in the order of their places, by the sequences of a batch."""
        number = sequence_of(batch).flatten().index_select(0, rows.index)
        _, sequence, counts = number.unique_consecutive(return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(sequence), device=sequence.device) - starts[sequence]
        longest = int(counts.max()) if len(counts) else 0
        return cls(sequence, place, torch.arange(longest, device=counts.device) < counts[:, None])

    def heads(self, x: Float[Tensor, "rows width"], heads: int) -> Heads:
        """Lay out vectors, split into heads. Raises ValueError where the width is no multiple of them."""
        if x.shape[-1] % heads:
            raise ValueError(f"{x.shape[-1]} numbers cannot be split into {heads} heads")
        laid = x.new_zeros(*self.real.shape, x.shape[-1]).index_put((self.sequence, self.place), x)
        return laid.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rows(self, values: Float[Tensor, "sequences length"]) -> Float[Tensor, "rows"]:
        """Return what was laid out, row by row."""
        return values[self.sequence, self.place]


def relation_kl(
    student: tuple[Heads, Heads],
    teacher: tuple[Heads, Heads],
    real: Bool[Tensor, "sequences length"],
    *,
    causal: bool,
    at_once: int = AT_ONCE,
) -> Float[Tensor, "sequences length"]:
    """Return KL(teacher's relation || student's) of each position as a query, the mean over heads (MiniLM, eq. 2 to 6).

    Sizes of a head may differ between the sides, their number may not. The teacher carries no gradient.
    """
    return _by_heads(_kl, student, teacher, real, causal, at_once)


def score_mse(
    student: tuple[Heads, Heads],
    teacher: tuple[Heads, Heads],
    real: Bool[Tensor, "sequences length"],
    *,
    causal: bool,
    at_once: int = AT_ONCE,
) -> Float[Tensor, "sequences length"]:
    """Return the squared error of each query's scores `x y^T / sqrt(size)`, the mean over its keys and over heads."""
    return _by_heads(_squared, student, teacher, real, causal, at_once)


def _by_heads(
    compare: Callable[..., Tensor],
    student: tuple[Heads, Heads],
    teacher: tuple[Heads, Heads],
    real: Tensor,
    causal: bool,
    at_once: int,
) -> Tensor:
    sequences, heads, length = student[0].shape[:3]
    flat = [widen(x).flatten(0, 1) for x in (*student, *(y.detach() for y in teacher))]
    sides = torch.arange(sequences, device=real.device).repeat_interleave(heads)
    step = max(1, at_once // max(1, length * length))
    one = partial(compare, causal=causal)
    if step < len(sides):
        one = partial(checkpoint, one, use_reentrant=False)
    with torch.autocast(real.device.type, enabled=False):  # products in bfloat16 would lose what differs
        parts = [one(*(x[i : i + step] for x in flat), real[sides[i : i + step]]) for i in range(0, len(sides), step)]
    if not parts:
        return flat[0].sum(-1).view(sequences, length)
    return torch.cat(parts).view(sequences, heads, length).mean(1).masked_fill(~real, 0.0)  # pyright: ignore[reportArgumentType]


def _kl(x: Tensor, y: Tensor, their_x: Tensor, their_y: Tensor, real: Tensor, *, causal: bool) -> Tensor:
    seen = _seen(real, causal)
    log_q, log_p = (_scores(a, b).masked_fill(~seen, -1e30).log_softmax(-1) for a, b in ((x, y), (their_x, their_y)))
    return (log_p.exp() * (log_p - log_q)).masked_fill(~seen, 0.0).sum(-1)


def _squared(x: Tensor, y: Tensor, their_x: Tensor, their_y: Tensor, real: Tensor, *, causal: bool) -> Tensor:
    seen = _seen(real, causal)
    error = (_scores(x, y) - _scores(their_x, their_y)).square().masked_fill(~seen, 0.0)
    return error.sum(-1) / seen.sum(-1).clamp(min=1)


def _scores(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(-1, -2) / x.shape[-1] ** 0.5


def _seen(real: Tensor, causal: bool) -> Tensor:
    """Return which keys each query has a relation to."""
    seen = real[:, None, :].expand(-1, real.shape[1], -1)
    return seen.tril() if causal else seen
