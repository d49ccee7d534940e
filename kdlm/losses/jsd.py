"""Generalised Jensen-Shannon divergence, in the sense of GKD."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import kl, log_mixture, log_prob_pair, rescale
from kdlm.losses.loss import Divergence


def generalised_jsd(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    beta: float = 0.5,
    normalised: bool = False,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`, `m = beta p + (1 - beta) q` (GKD, arXiv 2306.13649).

    `beta` 0 is forward KL(p || q) and 1 reverse KL(q || p), as GKD and TRL have it. The formula itself tends to 0 at
    both ends, so these two are jumps, and a sweep over small `beta` sweeps the learning rate too: `normalised` divides
    by `beta (1 - beta)` between the ends, which makes them limits. `beta` 0.5 is the ordinary JSD, at most log 2.
    Between the ends it is finite also where one side rules out what the other allows.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    if beta == 0:
        value = kl(log_p, log_q)
    elif beta == 1:
        value = kl(log_q, log_p)
    else:
        log_m = log_mixture(log_p, log_q, beta)
        value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        value = value / (beta * (1 - beta)) if normalised else value
    return rescale(value, temperature, t_squared)


class JSD(Divergence):
    """Generalised Jensen-Shannon divergence between forward KL (beta 0) and reverse KL (beta 1)."""

    name: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, ge=0, le=1)
    """GKD's sense: share of the teacher in the mixture; 0 is forward KL, 1 reverse KL."""
    normalised: bool = False
    """Divide by beta * (1 - beta) between the ends, which keeps the gradient of one order over beta."""
    divergence = staticmethod(generalised_jsd)
