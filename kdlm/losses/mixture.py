"""Alpha-mixture: KL to a power mean of teacher and student."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import kl, log_add, log_prob_pair, rescale
from kdlm.losses.loss import Divergence


def alpha_mixture(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    alpha: float = 0.0,
    share: float = 0.1,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 KL(p || r)`, `r ~ (share p^e + (1 - share) q^e)^(1/e)`, `e = (1 - alpha) / 2` (AMiD, ICLR 2026).

    `alpha` -1 is the arithmetic mean (skew KL), 1 the geometric one, `softmax` of the interpolated logits, and 3 the
    harmonic one. `share` is the teacher's part. The student in `r` carries gradient. In fp32 the relative precision
    falls as 1e-7 / |1 - alpha| close to, but not at, 1. Below `alpha` 1 it is finite also where the student rules out
    what the teacher allows.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}: at 1 the divergence is 0 whatever the student says")
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    log_r = torch.log_softmax(_power_mean(log_p, log_q, share, (1 - alpha) / 2), dim=-1) if share else log_q
    return rescale(kl(log_p, log_r), temperature, t_squared)


def _power_mean(
    log_p: Float[Tensor, "*rows vocab"], log_q: Float[Tensor, "*rows vocab"], share: float, e: float
) -> Float[Tensor, "*rows vocab"]:
    """Return `log (share p^e + (1 - share) q^e)^(1/e)`, not normalised."""
    if e == 0:
        return torch.add(log_q * (1 - share), log_p, alpha=share)  # not `lerp`: -inf less -inf is no number
    return log_add(e * log_p + math.log(share), e * log_q + math.log1p(-share)) / e


class AlphaMixture(Divergence):
    """KL(teacher || power mean of teacher and student): skew KL, and interpolated logits, in one family."""

    name: Literal["alpha_mixture"] = "alpha_mixture"
    alpha: float = 0.0
    """Kind of mean: -1 arithmetic (skew KL), 1 geometric (interpolated logits), 3 harmonic."""
    share: float = Field(0.1, ge=0, lt=1)
    """Share of the teacher in the mixture; 0 is forward KL."""
    divergence = staticmethod(alpha_mixture)
