"""ULD: the distance between two distributions over different vocabularies, blind to which token is which."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.losses.distributions import log_probs, widen
from kdlm.signal import TopK


def sorted_l1(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows their_vocab"] | TopK,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Float[Tensor, "*rows"]:
    """Return `sum_r |sort(q)_r - sort(p)_r|`, both descending, the shorter one with zeros (ULD, arXiv 2402.12030).

    It is 0 for equal rows and for any permutation of one of them, at most the L1 distance where the vocabularies are
    equal, and at most 2. There is no `T^2`. With `top_k`, or a teacher known by k tokens, only the k largest of
    both are compared, and the mass of the rest as one number: a lower bound, and no sort of the whole vocabulary.
    The teacher carries no gradient. Raises ValueError for a `TopK` at a temperature other than 1.
    """
    q = log_probs(student, temperature).exp()
    if isinstance(teacher, TopK):
        if temperature != 1.0:
            raise ValueError(f"temperature {temperature} on a top-k signal: it is known at temperature 1 only")
        p = widen(teacher.log_probs.detach()).to(q.dtype).exp()
        return masses_l1(q, p, min(p.shape[-1], top_k or p.shape[-1]))
    return masses_l1(q, log_probs(teacher.detach().to(q.dtype), temperature).exp(), top_k)


def masses_l1(
    q: Float[Tensor, "*rows ours"], p: Float[Tensor, "*rows theirs"], top_k: int | None = None
) -> Float[Tensor, "*rows"]:
    """Return the sorted L1 distance of two sets of masses, which need not add up to 1 unless there is a `top_k`.

    Without `top_k` the larger set is sorted only as far as the smaller one goes: what is left there meets zeros.
    """
    size = min(q.shape[-1], p.shape[-1]) if top_k is None else top_k
    largest, other = (_largest(x, size) for x in (q, p))
    value = (largest - other).abs().sum(-1)
    if top_k is None:
        if q.shape[-1] == p.shape[-1]:
            return value
        longer, head = (q, largest) if q.shape[-1] > p.shape[-1] else (p, other)
        return value + (longer.sum(-1) - head.sum(-1)).clamp(min=0)  # rounding may make it less
    return value + (largest.sum(-1) - other.sum(-1)).abs()


def _largest(masses: Tensor, size: int) -> Tensor:
    """Return the `size` largest masses in descending order, zeros behind them."""
    if size < masses.shape[-1]:
        return masses.topk(size, dim=-1).values
    return torch.nn.functional.pad(masses.sort(dim=-1, descending=True).values, (0, size - masses.shape[-1]))
