"""Measures: what is watched beside the loss. No gradient; computed in the pass that has the logits anyway."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.cross_entropy import cross_entropy as _cross_entropy
from kdlm.losses.distributions import log_probs
from kdlm.losses.kl import forward_kl
from kdlm.losses.loss import TeacherRows
from kdlm.losses.truncated import on_bucket, on_draws
from kdlm.losses.vocabulary import Vocab, cut, label_places
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Mixture, TopK


def cross_entropy(student: Tensor, teacher: Any, labels: Tensor, vocab: Vocab) -> Tensor:
    """Next-token loss of the student over its whole vocabulary, in nats."""
    return _cross_entropy(student, labels)


def kl_to_teacher(student: Tensor, teacher: Any, labels: Tensor, vocab: Vocab) -> Tensor:
    """KL(teacher || student) at temperature 1 over the shared ids, in nats; with top-k, its lower bound by buckets, or
    with draws from the rest an unbiased estimate."""
    shared = cut(student, vocab)
    if isinstance(teacher, TopK) and teacher.draws is not None:
        return on_draws(shared, teacher)
    return on_bucket(forward_kl, shared, teacher) if isinstance(teacher, TopK) else forward_kl(shared, teacher)


def top1_agreement(student: Tensor, teacher: Any, labels: Tensor, vocab: Vocab) -> Tensor:
    """1 where student and teacher have the same most probable token among the shared ids."""
    best = cut(student, vocab).argmax(-1)
    if isinstance(teacher, TopK):
        return best == teacher.ids.gather(-1, teacher.log_probs.argmax(-1, keepdim=True)).squeeze(-1)
    return best == teacher.argmax(-1)


def student_entropy(student: Tensor, teacher: Any, labels: Tensor, vocab: Vocab) -> Tensor:
    """Entropy of the student's next-token distribution over its whole vocabulary, in nats."""
    log_q = log_probs(student, 1.0)
    return -(log_q.exp() * log_q).sum(-1)


def accuracy(student: Tensor, teacher: Any, labels: Tensor, vocab: Vocab) -> Tensor:
    """1 where the student's most probable token is the label."""
    return student.argmax(-1) == labels


def teacher_cross_entropy(student: Tensor, teacher: Any, labels: Tensor, vocab: Vocab) -> Tensor:
    """Next-token loss of the teacher over the shared ids, in nats, infinite for a label that is none of them."""
    log_p = log_probs(teacher, 1.0)
    place = label_places(labels, log_p.shape[-1] if vocab is None else vocab)
    found = log_p.gather(-1, place.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(place != IGNORE_INDEX, -found, torch.inf)


_OF_STUDENT = {"cross_entropy": cross_entropy, "student_entropy": student_entropy, "accuracy": accuracy}
_OF_BOTH = {"kl_to_teacher": kl_to_teacher, "top1_agreement": top1_agreement}
_OF_WHOLE = {"teacher_cross_entropy": teacher_cross_entropy}
_ALL = _OF_STUDENT | _OF_BOTH | _OF_WHOLE


def measures_for(signal: type | None) -> tuple[str, ...]:
    """Return the measures that can be taken with a teacher that gives `signal` (a class, or None without teacher)."""
    if signal in (Dense, Hidden, Mixture):
        return tuple(_ALL)
    return tuple(_OF_STUDENT | _OF_BOTH if signal is TopK else _OF_STUDENT)


def chosen(names: tuple[str, ...], signal: type | None) -> dict[str, Callable[..., Tensor]]:
    """Return the functions of these measures. Raises ValueError for an unknown name or one the teacher cannot give."""
    possible = measures_for(signal)
    for name in names:
        if name not in possible:
            teacher = "no teacher" if signal is None else f"a {signal.__name__} teacher"
            raise ValueError(f"measure {name!r}: with {teacher} there are {', '.join(possible)}")
    return {name: _ALL[name] for name in names}


@torch.no_grad()
def measure(
    functions: dict[str, Callable[..., Tensor]],
    student: Float[Tensor, "rows vocab"],
    teacher: TeacherRows,
    labels: Int[Tensor, "rows"],
    vocab: Vocab,
) -> dict[str, Float[Tensor, "rows"]]:
    """Return each measure of each row."""
    return {name: function(student, teacher, labels, vocab).to(student.dtype) for name, function in functions.items()}
