"""Normalised KD: the teacher's mass on the label as a weight of cross-entropy, and the rest, normalised, beside it."""

from typing import Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import log_prob_pair, rescale, times
from kdlm.losses.targeted import Targeted, against_others, at, classes, without


def normalised_kd(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"] | None = None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `-p_y log q_y - gamma T^2 sum_{v != y} p'(v) log q'(v)` (NKD, ICCV 2023, arXiv 2303.13005).

    y is the label; p and q are at temperature 1, p' and q' those of the other classes among themselves at temperature T
    (lambda in the paper). Both terms are cross-entropies, so the value is **not** 0 at equality, and the first pulls
    q_y beyond p_y; the second is least at `q' = p'`. Meant beside `cross_entropy`. A label of IGNORE_INDEX, or none at
    all: the teacher's most probable class.
    """
    log_q, log_p = log_prob_pair(student, teacher, 1.0)
    label = classes(labels, log_p)
    target = -times(at(log_p, label).exp(), at(log_q, label))
    if temperature != 1.0:
        log_q, log_p = log_prob_pair(student, teacher, temperature)
    shares = without(against_others(log_p, label).exp(), label)
    others = -times(shares, against_others(log_q, label)).sum(-1)
    return target + gamma * rescale(others, temperature, t_squared)


class NKD(Targeted):
    """Cross-entropy weighed by the teacher's mass on the label, and cross-entropy to its shares of the others."""

    name: Literal["nkd"] = "nkd"
    gamma: float = Field(1.5, ge=0)
    """Weight of the other classes. The paper has 1.5 at temperature 1 for ImageNet, 3.5 at temperature 3 for
    CIFAR-100."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of the other classes; the label's mass is taken at temperature 1."""
    t_squared: bool = True
    """Multiply the part of the other classes by temperature^2, as the paper does."""
    divergence = staticmethod(normalised_kd)
