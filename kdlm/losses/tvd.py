"""Total variation distance."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kdlm.losses.distributions import log_prob_pair, rescale
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


class TVD(Divergence):
    """Half the sum of absolute differences: 1 minus the acceptance rate of speculative sampling."""

    name: Literal["tvd"] = "tvd"
    divergence = staticmethod(total_variation)
