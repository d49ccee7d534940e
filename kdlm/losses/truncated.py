"""Truncated teachers: the k most probable tokens, and one bucket for all the rest.

Comparing `(p_K, 1 - sum p_K)` with `(q_K, 1 - sum q_K)` asks the student for the right tail mass, where the
renormalised top-k inflates the kept probabilities by `1 / sum p_K`. By the chain rule of the KL
`KL(p || q) = KL(buckets) + tail * KL(p_tail || q_tail)`: the bucket is a lower bound, and so for every f-divergence.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.losses.distributions import log_probs, widen
from kdlm.losses.sampled import sampled_cross_entropy
from kdlm.signal import TopK

_FLOOR = -1e4
"""A log-probability whose exponential is 0, and which, unlike -inf, can be subtracted from itself."""


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `log(1 - exp(x))` for `x < 0`, accurate at both ends (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # Each branch sees a harmless argument where the other is taken: `where` would pass its NaN gradient on.
    return torch.where(
        near_zero,
        torch.log(-torch.expm1(torch.where(near_zero, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))),
    )


def with_tail(kept: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows k_plus_1"]:
    """Append the logarithm of the mass that the kept log-probabilities leave."""
    mass = torch.logsumexp(kept, dim=-1, keepdim=True).clamp(max=-torch.finfo(kept.dtype).eps)
    return torch.cat([kept, log1mexp(mass)], dim=-1)


def bucket(
    student: Float[Tensor, "*rows vocab"], teacher: TopK
) -> tuple[Float[Tensor, "*rows k_plus_1"], Float[Tensor, "*rows k_plus_1"]]:
    """Return log-probabilities of student and teacher over the teacher's k tokens and one bucket for the rest.

    They are normalised, hence logits too: any divergence of this room takes them as they are, at temperature 1. A
    kept id beyond the student's vocabulary (a teacher head with more padding) counts as tail on both sides.
    """
    vocab = student.shape[-1]
    inside = teacher.ids < vocab
    log_q = log_probs(student, 1.0).gather(-1, teacher.ids.clamp(max=vocab - 1)).masked_fill(~inside, _FLOOR)
    log_p = widen(teacher.log_probs.detach()).clamp(min=_FLOOR).masked_fill(~inside, _FLOOR)
    return with_tail(log_q), with_tail(log_p)


def on_draws(
    student: Float[Tensor, "*rows vocab"], teacher: TopK, *, temperature: float = 1.0
) -> Float[Tensor, "*rows"]:
    """Return forward KL from a top-k signal with draws from its rest: exact on the k tokens, unbiased on the others.

    `sum_K p log(p / q) + rest mean_draws log(p / q)`: 0 at equality whatever was drawn, and its expected gradient is
    `q - p` over the whole vocabulary, of less variance than that of as many draws from p, since only the rest is drawn.
    Raises ValueError at a temperature other than 1.
    """
    target, negative_entropy = teacher.spread()
    return sampled_cross_entropy(student, target, temperature=temperature) + negative_entropy


def on_bucket(
    divergence: Callable[..., Float[Tensor, "*rows"]],
    student: Float[Tensor, "*rows vocab"],
    teacher: TopK,
    **options: Any,
) -> Float[Tensor, "*rows"]:
    """Return a divergence of student logits from a top-k signal. Raises ValueError at a temperature other than 1."""
    if options.get("temperature", 1.0) != 1.0:
        raise ValueError(
            f"temperature {options['temperature']} on a top-k signal: its tail is known as one mass only, and how "
            "that mass spreads at another temperature is not; use temperature 1 or a teacher that gives full logits"
        )
    return divergence(*bucket(student, teacher), **options)
