"""Adaptive KL: forward and reverse KL weighted by where the gap is."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import kl, log_prob_pair, rescale
from kdlm.losses.loss import Divergence


def adaptive_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    head_mass: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 (w KL(p || q) + (1 - w) KL(q || p))` (AKL, COLING 2025, arXiv 2404.02657).

    `w` is the head's share of `sum |p - q|`, without gradient; the head is the most probable tokens of the teacher up
    to a mass of `head_mass` (mu in the paper), at least one. Tokens of one probability enter it together, so the order
    of the vocabulary never matters. At equality `w` is 1/2. It is inf where one side rules out (a logit of -inf) what
    the other allows.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        total = gap.sum(-1)
        head = gap.masked_fill_(~_head(p, head_mass), 0.0).sum(-1)
        w = torch.where(total > 0, head / total.clamp(min=torch.finfo(p.dtype).tiny), 0.5)
    return rescale(w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p), temperature, t_squared)


def _head(p: Float[Tensor, "*rows vocab"], mass: float) -> Bool[Tensor, "*rows vocab"]:
    """Mark the most probable tokens of each row whose cumulative mass stays within `mass`, and always the first."""
    vocab = p.shape[-1]
    k = min(64, vocab)
    # Heads are short: sorting whole rows would cost more than the two KLs.
    while True:
        top = p.topk(k, dim=-1).values
        cumulative = top.cumsum(-1)
        if k == vocab or bool((cumulative[..., -1] > mass).all()):
            break
        k = min(8 * k, vocab)
    last = ((cumulative <= mass).sum(-1, keepdim=True) - 1).clamp(min=0)
    return p >= top.gather(-1, last)


class AdaptiveKL(Divergence):
    """Forward KL where the gap lies in the teacher's head, reverse KL where it lies in the tail."""

    name: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(0.5, ge=0, le=1)
    """Mass of the teacher's distribution that counts as its head (mu in the paper)."""
    divergence = staticmethod(adaptive_kl)
