"""Kullback-Leibler divergences, both ways."""

from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.distributions import kl, log_prob_pair, rescale
from kdlm.losses.loss import Divergence, TeacherRows
from kdlm.losses.sampled import sampled_cross_entropy
from kdlm.losses.truncated import on_draws
from kdlm.signal import Dense, Hidden, Mixture, Sampled, TopK


def forward_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 KL(p || q)`, teacher p first: mass-covering (Hinton et al. 2015, arXiv 1503.02531).

    The gradient to the student's logits is `T (q - p)`, both at temperature T; it tends to the difference of centred
    logits over the vocabulary size as T grows. In nats, 0 at equality; the teacher carries no gradient. Tokens that the
    teacher rules out (logits of -inf) add nothing; it is inf where the student rules out what the teacher allows.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    return rescale(kl(log_p, log_q), temperature, t_squared)


def reverse_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 KL(q || p)`, student q first: mode-seeking (MiniLLM, arXiv 2306.08543).

    On the student's own samples it estimates the divergence of whole sequences; on fixed text it is a loss per
    position only. Tokens that the teacher finds all but impossible weigh heavily: the ratio is not bounded. Where it
    rules out (a logit of -inf) what the student allows the value is inf, and there is no gradient.
    """
    log_q, log_p = log_prob_pair(student, teacher, temperature)
    return rescale(kl(log_q, log_p), temperature, t_squared)


class ForwardKL(Divergence):
    """KL(teacher || student): the student covers everything that the teacher finds likely."""

    name: Literal["forward_kl"] = "forward_kl"
    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture, TopK, Sampled})
    divergence = staticmethod(forward_kl)

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"] | None = None
    ) -> Float[Tensor, "rows"]:
        if isinstance(teacher, Sampled):
            return sampled_cross_entropy(student, teacher, temperature=self.temperature)
        if isinstance(teacher, TopK) and teacher.draws is not None:
            return on_draws(student, teacher, temperature=self.temperature)
        return super().__call__(student, teacher, labels)


class ReverseKL(Divergence):
    """KL(student || teacher): the student settles on some of what the teacher finds likely."""

    name: Literal["reverse_kl"] = "reverse_kl"
    divergence = staticmethod(reverse_kl)
