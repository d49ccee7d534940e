"""Decoupled KD: how sure of the label, and how the rest is shared out, each with a weight of its own."""

from typing import Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdlm.losses.distributions import log_prob_pair, rescale, times
from kdlm.losses.targeted import Targeted, against_others, at, classes, without


def decoupled_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"] | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 (alpha TCKD + beta NCKD)` (DKD, CVPR 2022, arXiv 2203.08679).

    TCKD is the KL between `[p_y, 1 - p_y]` and `[q_y, 1 - q_y]`, y the label; NCKD that between p and q among the other
    classes, renormalised. `KL(p || q) = TCKD + (1 - p_y) NCKD`: where the teacher is sure of the label, forward KL
    hardly listens to what it says of the rest, and this does. 0 at equality. A label of IGNORE_INDEX, or none at all:
    the teacher's most probable class.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    label = classes(labels, log_p)
    ours, theirs = against_others(log_q, label), against_others(log_p, label)
    odds_q, odds_p = at(ours, label), at(theirs, label)
    sure = times(odds_p.sigmoid(), logsigmoid(odds_p) - logsigmoid(odds_q))
    unsure = times((-odds_p).sigmoid(), logsigmoid(-odds_p) - logsigmoid(-odds_q))
    among_others = times(without(theirs.exp(), label), theirs - ours).sum(-1)
    return rescale(alpha * (sure + unsure) + beta * among_others, temperature, t_squared)


class DKD(Targeted):
    """Forward KL in two parts: the mass of the label, and the shares of the other classes."""

    name: Literal["dkd"] = "dkd"
    alpha: float = Field(1.0, ge=0)
    """Weight of the KL between the masses of the label and of all the rest (TCKD)."""
    beta: float = Field(0.5, ge=0)
    """Weight of the KL among the other classes (NCKD); forward KL has 1 - p(label) there. The defaults, with
    temperature 1, are the paper's for ImageNet, the setting with many classes; for CIFAR-100 it has 8 and temperature
    4, with a linear warm-up of `weight` over 20 of 240 epochs."""
    divergence = staticmethod(decoupled_kl)
