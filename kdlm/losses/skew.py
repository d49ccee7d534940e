"""Skew divergences: KL to a mixture, whose ratio is bounded (DistiLLM, ICML 2024, arXiv 2402.03898)."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import kl, log_mixture, log_prob_pair, rescale
from kdlm.losses.loss import Divergence


def skew_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    skew: float | Float[Tensor, "*rows"] = 0.1,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 KL(p || skew p + (1 - skew) q)`; `skew` 0 is forward KL.

    At most `-T^2 log(skew)`. The student in the mixture carries gradient. A true divergence: 0 at equality, where
    released code, which leaves the teacher's entropy in, gives that entropy. `skew` may differ by row, then above 0.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    return rescale(kl(log_p, log_q if _unmixed(skew) else log_mixture(log_p, log_q, skew)), temperature, t_squared)


def skew_reverse_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    skew: float | Float[Tensor, "*rows"] = 0.1,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 KL(q || (1 - skew) p + skew q)`; `skew` 0 is reverse KL.

    At most `-T^2 log(skew)`. Both copies of the student carry gradient (DistiLLM-2's code detaches the one in the
    mixture, which leaves the value and changes the gradient). `skew` may differ by row, then above 0. Finite also where
    the teacher rules tokens out, except for `skew` 0.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    return rescale(kl(log_q, log_p if _unmixed(skew) else log_mixture(log_p, log_q, 1 - skew)), temperature, t_squared)


def _unmixed(skew: float | Tensor) -> bool:
    """Whether nothing is mixed in. Raises ValueError for a number out of range."""
    if isinstance(skew, Tensor):  # looking into it would wait for the device
        return False
    if not 0 <= skew < 1:
        raise ValueError(f"skew must lie in [0, 1), got {skew}: at 1 the divergence is 0 whatever the student says")
    return skew == 0


class SkewKL(Divergence):
    """KL(teacher || skew * teacher + (1 - skew) * student)."""

    name: Literal["skew_kl"] = "skew_kl"
    skew: float = Field(0.1, ge=0, lt=1)
    """Share of the teacher in the mixture; 0 is forward KL."""
    divergence = staticmethod(skew_kl)


class SkewReverseKL(Divergence):
    """KL(student || (1 - skew) * teacher + skew * student)."""

    name: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    skew: float = Field(0.1, ge=0, lt=1)
    """Share of the student in the mixture; 0 is reverse KL."""
    divergence = staticmethod(skew_reverse_kl)
