"""OFA: cross-entropy to a teacher whose opinion of the label is strengthened."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import log_prob_pair, rescale, times
from kdlm.losses.targeted import Targeted, at, classes


def ofa(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"] | None = None,
    *,
    eps: float = 1.5,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `-T^2 sum_v [(p(v) + 1[v = y])^eps - 1[v = y]] log q(v)` (OFA-KD, NeurIPS 2023, arXiv 2310.19444).

    `eps` 1 is the cross-entropy of q under p: it has the gradient of forward KL, and the teacher's entropy in its
    value, which is therefore **not** 0 at equality. Above 1 the label y weighs more than in p and the others less,
    and the weights do not add up to 1. A label of IGNORE_INDEX, or none at all: the teacher's most probable class. The
    released code has no `T^2`, and runs at temperature 1. Raises ValueError for `eps` below 1.
    """
    if not eps >= 1:
        raise ValueError(f"eps must be at least 1, got {eps}: below it the label would weigh less than in the teacher")
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    label = classes(labels, log_p)
    of_label = torch.expm1(eps * torch.log1p(at(log_p, label).exp()))
    weights = (eps * log_p).exp().scatter(-1, label.unsqueeze(-1), of_label.unsqueeze(-1))
    return rescale(-times(weights, log_q).sum(-1), temperature, t_squared)


class OFA(Targeted):
    """Cross-entropy to the teacher, in which the label weighs more than the teacher gives it."""

    name: Literal["ofa"] = "ofa"
    eps: float = Field(1.5, ge=1)
    """How much more: 1 is the teacher itself. The paper has 1 for CIFAR-100 and 1.5 for some pairs on ImageNet."""
    divergence = staticmethod(ofa)
