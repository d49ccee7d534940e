"""Measures: what is watched beside the loss. No gradient; computed in the pass that has the logits anyway."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.cross_entropy import cross_entropy as _cross_entropy
from kdlm.losses.distributions import entropy_of, kl, log_probs
from kdlm.losses.loss import TeacherRows
from kdlm.losses.truncated import bucket, on_draws
from kdlm.losses.vocabulary import Vocab, cut, label_places
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Mixture, TopK


@dataclass(frozen=True)
class Seen:
    """A few rows of student and teacher, and what several measures make of them, made once.

    Attributes:
        student: logits over the student's whole vocabulary.
        teacher: logits over the shared ids, a `TopK`, or nothing that can be compared.
        labels: next tokens, as the student counts ids.
        vocab: the shared ids.
    """

    student: Float[Tensor, "rows vocab"]
    teacher: TeacherRows
    labels: Int[Tensor, "rows"]
    vocab: Vocab

    @cached_property
    def shared(self) -> Float[Tensor, "rows shared"]:
        """The student's logits of the shared ids."""
        return cut(self.student, self.vocab)

    @cached_property
    def log_whole(self) -> Float[Tensor, "rows vocab"]:
        """The student's distribution over its whole vocabulary."""
        return log_probs(self.student, 1.0)

    @cached_property
    def pair(self) -> tuple[Float[Tensor, "rows places"], Float[Tensor, "rows places"]]:
        """`(log q, log p)` over the shared ids, or over the teacher's k tokens and one bucket for the rest."""
        if isinstance(self.teacher, TopK):
            return bucket(self.shared, self.teacher)
        log_q = self.log_whole if self.vocab is None else log_probs(self.shared, 1.0)
        return log_q, log_probs(self.whole.to(log_q.dtype), 1.0)

    @property
    def whole(self) -> Tensor:
        """The teacher's logits, where it gives them."""
        assert isinstance(self.teacher, Tensor)
        return self.teacher

    @cached_property
    def places(self) -> Int[Tensor, "rows"]:
        """Where each label is among the shared ids; IGNORE_INDEX for one that is none of them."""
        return label_places(self.labels, self.whole.shape[-1] if self.vocab is None else self.vocab)

    @property
    def favourite(self) -> Int[Tensor, "rows"]:
        """Place of the teacher's most probable token among the shared ids."""
        if isinstance(self.teacher, TopK):
            return self.teacher.ids.gather(-1, self.teacher.log_probs.argmax(-1, keepdim=True)).squeeze(-1)
        return self.whole.argmax(-1)

    def favourites(self, count: int) -> Int[Tensor, "rows count"]:
        """Return the places of the teacher's most probable tokens. Raises ValueError where it gives fewer."""
        if not isinstance(self.teacher, TopK):
            return self.whole.topk(count).indices
        if (given := self.teacher.ids.shape[-1]) < count:
            raise ValueError(f"the teacher's {count} most probable tokens are wanted, and it gives {given} of them")
        return self.teacher.ids.gather(-1, self.teacher.log_probs.topk(count).indices)


def cross_entropy(seen: Seen) -> Tensor:
    """Next-token loss of the student over its whole vocabulary, in nats."""
    return _cross_entropy(seen.student, seen.labels)


def student_entropy(seen: Seen) -> Tensor:
    """Entropy of the student's next-token distribution over its whole vocabulary, in nats."""
    return entropy_of(seen.log_whole)


def accuracy(seen: Seen) -> Tensor:
    """1 where the student's most probable token is the label."""
    return seen.student.argmax(-1) == seen.labels


def confidence(seen: Seen) -> Tensor:
    """Probability of the student's most probable token: calibration holds it against `accuracy`."""
    return seen.log_whole.amax(-1).exp()


def brier(seen: Seen) -> Tensor:
    """Squared distance of the student's whole distribution to the one-hot label, in [0, 2] (Brier 1950)."""
    return _brier(seen.log_whole, seen.labels)


def kl_to_teacher(seen: Seen) -> Tensor:
    """KL(teacher || student) at temperature 1 over the shared ids, in nats; with top-k, its lower bound by buckets, or
    with draws from the rest an unbiased estimate."""
    if isinstance(seen.teacher, TopK) and seen.teacher.draws is not None:
        return on_draws(seen.shared, seen.teacher)
    log_q, log_p = seen.pair
    return kl(log_p, log_q)


def reverse_kl_to_teacher(seen: Seen) -> Tensor:
    """KL(student || teacher) at temperature 1 over the shared ids, in nats; with top-k, its lower bound by buckets."""
    return kl(*seen.pair)


def top1_agreement(seen: Seen) -> Tensor:
    """1 where student and teacher have the same most probable token among the shared ids."""
    return seen.shared.argmax(-1) == seen.favourite


def top5_agreement(seen: Seen) -> Tensor:
    """Share of the teacher's five most probable tokens that are among the student's five, of the shared ids.

    Of fewer shared ids than five it is 1.
    """
    count = min(5, seen.shared.shape[-1])
    ours, theirs = seen.shared.topk(count).indices, seen.favourites(count)
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean(-1)


def acceptance_rate(seen: Seen) -> Tensor:
    """`sum_v min(p, q)`: how likely speculative decoding keeps a token that the student drafts for the teacher.

    It is 1 less the total variation distance (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6). With top-k an
    upper bound, by buckets.
    """
    log_q, log_p = seen.pair
    return torch.minimum(log_q, log_p).exp().sum(-1)


def teacher_entropy(seen: Seen) -> Tensor:
    """Entropy of the teacher's distribution over the shared ids, in nats; with top-k, a lower bound by buckets."""
    return entropy_of(seen.pair[1])


def teacher_confidence(seen: Seen) -> Tensor:
    """Probability of the teacher's most probable token among the shared ids."""
    if isinstance(seen.teacher, TopK):
        return seen.teacher.log_probs.amax(-1).exp()
    return seen.pair[1].amax(-1).exp()


def teacher_accuracy(seen: Seen) -> Tensor:
    """1 where the teacher's most probable token is the label, 0 for a label that is none of the shared ids."""
    places = seen.labels if isinstance(seen.teacher, TopK) else seen.places
    return seen.favourite == places


def teacher_cross_entropy(seen: Seen) -> Tensor:
    """Next-token loss of the teacher over the shared ids, in nats, infinite for a label that is none of them."""
    return -label_log_p(seen.pair[1], seen.places)


def teacher_brier(seen: Seen) -> Tensor:
    """Squared distance of the teacher's distribution over the shared ids to the one-hot label, in [0, 2]."""
    return _brier(seen.pair[1], seen.places)


def label_log_p(log_p: Float[Tensor, "rows vocab"], places: Int[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Return the log-probability of each label; -inf where the place is IGNORE_INDEX."""
    found = log_p.gather(-1, places.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(places != IGNORE_INDEX, found, -torch.inf)


def _brier(log_p: Tensor, places: Tensor) -> Tensor:
    return log_p.exp().square().sum(-1) - 2 * label_log_p(log_p, places).exp() + 1


Measure = Callable[[Seen], Tensor]
_OF_STUDENT: dict[str, Measure] = {
    "cross_entropy": cross_entropy,
    "student_entropy": student_entropy,
    "accuracy": accuracy,
}
_OF_BOTH: dict[str, Measure] = {"kl_to_teacher": kl_to_teacher, "top1_agreement": top1_agreement}
_OF_WHOLE: dict[str, Measure] = {"teacher_cross_entropy": teacher_cross_entropy}
_MORE_OF_STUDENT: dict[str, Measure] = {"confidence": confidence, "brier": brier}
_MORE_OF_BOTH: dict[str, Measure] = {
    "reverse_kl_to_teacher": reverse_kl_to_teacher,
    "top5_agreement": top5_agreement,
    "acceptance_rate": acceptance_rate,
    "teacher_entropy": teacher_entropy,
    "teacher_confidence": teacher_confidence,
    "teacher_accuracy": teacher_accuracy,
}
_MORE_OF_WHOLE: dict[str, Measure] = {"teacher_brier": teacher_brier}
_ALL = _OF_STUDENT | _OF_BOTH | _OF_WHOLE | _MORE_OF_STUDENT | _MORE_OF_BOTH | _MORE_OF_WHOLE


def measures_for(signal: type | None) -> tuple[str, ...]:
    """Return what evaluation watches with a teacher that gives `signal` (a class, or None without teacher).

    These are the measures that the kernels take in passing. All that there are: `all_measures_for`.
    """
    if signal in (Dense, Hidden, Mixture):
        return tuple(_OF_STUDENT | _OF_BOTH | _OF_WHOLE)
    return tuple(_OF_STUDENT | _OF_BOTH if signal is TopK else _OF_STUDENT)


def all_measures_for(signal: type | None) -> tuple[str, ...]:
    """Return every measure that can be taken with a teacher that gives `signal`, those of `measures_for` first.

    `top5_agreement` of a `TopK` wants at least five tokens.
    """
    more = _MORE_OF_STUDENT
    if signal in (Dense, Hidden, Mixture):
        more = more | _MORE_OF_BOTH | _MORE_OF_WHOLE
    elif signal is TopK:
        more = more | _MORE_OF_BOTH
    return (*measures_for(signal), *more)


def chosen(names: tuple[str, ...], signal: type | None) -> dict[str, Measure]:
    """Return the functions of these measures. Raises ValueError for an unknown name or one the teacher cannot give."""
    possible = all_measures_for(signal)
    for name in names:
        if name not in possible:
            teacher = "no teacher" if signal is None else f"a {signal.__name__} teacher"
            raise ValueError(f"measure {name!r}: with {teacher} there are {', '.join(possible)}")
    return {name: _ALL[name] for name in names}


@torch.no_grad()
def measure(
    functions: dict[str, Measure],
    student: Float[Tensor, "rows vocab"],
    teacher: TeacherRows,
    labels: Int[Tensor, "rows"],
    vocab: Vocab,
) -> dict[str, Float[Tensor, "rows"]]:
    """Return each measure of each row."""
    seen = Seen(student, teacher, labels, vocab)
    return {name: function(seen).to(student.dtype) for name, function in functions.items()}
