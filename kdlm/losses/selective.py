"""The terms of TSD-KD: a ranking, a gated divergence, an entropy. Which rows they are for is the method's business."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.losses.distributions import LARGE, entropy_of, log_prob_pair, log_probs, widen
from kdlm.losses.jsd import generalised_jsd
from kdlm.losses.loss import TeacherRows
from kdlm.signal import Dense, Hidden, Mixture


def plackett_luce(
    student: Float[Tensor, "*rows vocab"], teacher: Float[Tensor, "*rows vocab"], *, k: int = 10
) -> Float[Tensor, "*rows"]:
    """Return `-log` of the chance that the student ranks its own k most probable tokens as the teacher does.

    Ranks are drawn without replacement in proportion to the student's probabilities (Plackett-Luce): with pi the order
    of the candidates by teacher logit, best first, `sum_j logsumexp_{l >= j} z[pi(l)] - z[pi(j)]` (TSD-KD, arXiv
    2603.13260). Which tokens are candidates carries no gradient. In nats; 0 with one candidate, and else above 0.
    """
    student = widen(student)
    candidates = student.detach().topk(min(k, student.shape[-1]), dim=-1).indices
    order = teacher.detach().gather(-1, candidates).argsort(dim=-1, descending=True, stable=True)
    z = student.gather(-1, candidates.gather(-1, order))
    impossible = z == -torch.inf  # where fewer than k tokens are possible
    z = z.masked_fill(impossible, -LARGE)
    left = z.flip(-1).logcumsumexp(-1).flip(-1)  # over the candidates that are not ranked yet
    return (left - z).masked_fill(impossible, 0.0).sum(-1)


def entropy(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """Return the entropy of `softmax(logits)` in nats."""
    return entropy_of(log_probs(logits, 1.0))


def gated_jsd(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    beta: float = 0.9,
    gate_temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """Return `sg[sigmoid((H(q) - H(p)) / gate_temperature)]` times the generalised JSD (TSD-KD, arXiv 2603.13260).

    The gate is 1/2 where both are equally certain, and more where the student is less certain than the teacher.
    """
    with torch.no_grad():
        log_q, log_p = log_prob_pair(student, teacher, 1.0)
        gate = torch.sigmoid((entropy_of(log_q) - entropy_of(log_p)) / gate_temperature)
    return gate * generalised_jsd(student, teacher, beta=beta)


@dataclass(frozen=True)
class Selective:
    """TSD-KD's three terms on rows that each want another amount of each; runs in chunks (`chunked`, `has_aux`).

    Attributes:
        weight: of the ranking, beside the two others, which have 1.
        k: candidates that are ranked.
        beta, gate_temperature: of the gated divergence.
    """

    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture})
    needs_teacher: ClassVar[bool] = True

    weight: float = 0.1
    k: int = 10
    beta: float = 0.9
    gate_temperature: float = 1.0

    def __call__(
        self,
        student: Float[Tensor, "rows vocab"],
        teacher: TeacherRows,
        indirect: Float[Tensor, "rows"],
        direct: Float[Tensor, "rows"],
        certainty: Float[Tensor, "rows"],
    ) -> tuple[Float[Tensor, "rows"], dict[str, Float[Tensor, "rows"]]]:
        """Return the weighted sum, and each term; the last three arguments say how much of each a row contributes."""
        if not isinstance(teacher, Tensor):
            given = "no teacher" if teacher is None else f"a {type(teacher).__name__} signal"
            raise ValueError(f"tsd_kd takes a signal of Dense, Hidden, Mixture, got {given}")
        ranked = indirect.nonzero().squeeze(-1)  # few rows, and candidates are dear
        ranking = plackett_luce(student[ranked], teacher[ranked], k=self.k)
        matched = gated_jsd(student, teacher, beta=self.beta, gate_temperature=self.gate_temperature)
        terms = {
            "indirect": torch.zeros_like(matched).index_put((ranked,), ranking.to(matched)) * indirect,
            "direct": matched * direct,
            "entropy": entropy(student) * certainty,
        }
        return self.weight * terms["indirect"] + terms["direct"] + terms["entropy"], terms
