"""Forward and reverse KL together, for students of few bits: split at the teacher's top k, or by how sure it is."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import kl, log_prob_pair, rescale, times
from kdlm.losses.loss import Divergence
from kdlm.signal import Dense, Hidden, Mixture


def topk_divergence(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    k: int = 20,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 (sum over K of d(p, q) + sum over the rest of d(q, p))`, `d(a, b) = a log(a/b) - a + b`.

    K is the teacher's `k` most probable tokens; those of one probability enter it together, so the order of the
    vocabulary never matters. `k` of the whole vocabulary is forward KL, 0 is reverse KL, and no term is negative.

    After TopKLD (arXiv 2501.06218), which balances explicit knowledge, the teacher's top k, and implicit knowledge, the
    rest, by forward and reverse KL. **Unverified**: only the abstract and reviews were at hand, no formula and no code.
    Which divergence belongs to which part, and `- a + b`, without which a part may be negative, are our reading.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    ranked = log_p.topk(min(k, log_p.shape[-1]), dim=-1).values
    head = log_p >= ranked[..., -1:] if k else torch.zeros_like(log_p, dtype=torch.bool)
    a, b = torch.where(head, log_p, log_q), torch.where(head, log_q, log_p)
    return rescale((times(a.exp(), a - b) - a.exp() + b.exp()).sum(-1), temperature, t_squared)


def confidence_aware_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    confidence: float | None = None,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 (g KL(q || p) + (1 - g) KL(p || q))`, g the teacher's `confidence` (BitDistiller, arXiv 2402.10631).

    The released code, with which this form was compared, has one g for all of training: the mean, over some batches
    beforehand, of the teacher's greatest probability. None takes that of each row instead, which needs no pass before
    training and no batch; this is ours.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    g = log_p.amax(-1).exp() if confidence is None else confidence
    return rescale(g * kl(log_q, log_p) + (1 - g) * kl(log_p, log_q), temperature, t_squared)


class TopKLD(Divergence):
    """Forward KL's terms at the teacher's most probable tokens, reverse KL's at all others."""

    name: Literal["topkld"] = "topkld"
    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture})
    k: int = Field(20, ge=0)
    """How many of the teacher's most probable tokens make the first part; 0 is reverse KL."""
    divergence = staticmethod(topk_divergence)


class CAKLD(Divergence):
    """Reverse KL where the teacher is sure, forward KL where it is not."""

    name: Literal["cakld"] = "cakld"
    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture})
    confidence: float | None = Field(None, ge=0, le=1)
    """Share of reverse KL. The paper has one number, the mean of the teacher's greatest probability over the training
    text; by default it is each token's own."""
    divergence = staticmethod(confidence_aware_kl)
