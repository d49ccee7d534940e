"""Total variation distance, and its policy gradient with standardised rewards (TVD++)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.losses.distributions import log_prob_pair, rescale, times
from kdlm.losses.loss import Divergence


def total_variation(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 / 2 sum_v |p(v) - q(v)|` (DistillSpec, arXiv 2310.08461).

    At temperature 1 it is 1 minus the acceptance rate of exact speculative sampling with the student as the draft. Its
    gradient is bounded, and vanishes where q is near 0: start from a student that is not too far off.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    return rescale((log_p.exp() - log_q.exp()).abs().sum(-1) / 2, temperature, t_squared)


def tvd_plus_plus(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2` times the total variation distance, with the gradient of TVD++ (arXiv 2403.00858).

    Total variation's gradient is a policy gradient, `-E_q[r grad log q]` with the reward `r(v) = 1` where p(v) > q(v),
    and any baseline leaves it alone. TVD++ takes standardised rewards, `-E_q[A grad log q]`, A of `standardised`. So
    each row has the direction of total variation's gradient, divided by the spread of its reward, which lifts the
    rows where one side of p > q has little of the student's mass; `sum_v |gradient|` stays at most T.

    Only the gradient is TVD++'s: what it is the gradient of (`-E_q[sg[A] log q]`) is no measure of anything, so the
    value is the distance itself, 0 at equality and comparable with `total_variation`. Finite differences of the value
    therefore do not give the gradient. Rewards are standardised in each row, under q; over which axis the paper does
    it is not verified, and over a batch it would depend on how the batch was cut.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    with torch.no_grad():
        q, p = log_q.exp(), log_p.exp()
        distance = (p - q).abs().sum(-1) / 2
        pull = q * standardised((p > q).to(q), q)
    surrogate = -times(pull, log_q).sum(-1)
    return rescale(distance + (surrogate - surrogate.detach()), temperature, t_squared)


def standardised(reward: Float[Tensor, "*rows vocab"], q: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Return rewards minus their mean under q, over their standard deviation under q plus 1e-5: 0 where all agree."""
    centred = reward - (q * reward).sum(-1, keepdim=True)
    return centred / ((q * centred.square()).sum(-1, keepdim=True).sqrt() + 1e-5)


class TVD(Divergence):
    """Half the sum of absolute differences: 1 minus the acceptance rate of speculative sampling."""

    name: Literal["tvd"] = "tvd"
    divergence = staticmethod(total_variation)


class TVDPlusPlus(Divergence):
    """Total variation distance with the gradient of standardised rewards (TVD++): for speculative decoding's drafts."""

    name: Literal["tvd_plus_plus"] = "tvd_plus_plus"
    divergence = staticmethod(tvd_plus_plus)
