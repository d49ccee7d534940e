"""What losses that set the label's class apart share: which class that is, and how the others compare with it."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.distributions import LARGE
from kdlm.losses.loss import Divergence, TeacherRows
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Mixture


def classes(labels: Int[Tensor, "*rows"] | None, teacher: Float[Tensor, "*rows vocab"]) -> Int[Tensor, "*rows"]:
    """Return the label of each row, and where it is IGNORE_INDEX, or there are none, the teacher's likeliest class."""
    likeliest = teacher.argmax(-1)
    return likeliest if labels is None else torch.where(labels == IGNORE_INDEX, likeliest, labels)


def against_others(log_q: Float[Tensor, "*rows vocab"], label: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows vocab"]:
    """Return `log q(v) - log(1 - q(label))`, summed up without the label, so that it stays finite as q(label) -> 1.

    For the other classes these are log-probabilities among themselves; at the label they are its log-odds. There must
    be at least two classes.
    """
    # Others that are all ruled out still have a finite sum, or the gradient would not be a number.
    others = log_q.clamp(min=-LARGE).scatter(-1, label.unsqueeze(-1), -torch.inf)
    return log_q - others.logsumexp(-1, keepdim=True)


def without(values: Float[Tensor, "*rows vocab"], label: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows vocab"]:
    """Return the values with a 0 at the label."""
    return values.scatter(-1, label.unsqueeze(-1), 0.0)


def at(values: Float[Tensor, "*rows vocab"], label: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return the value at the label."""
    return values.gather(-1, label.unsqueeze(-1)).squeeze(-1)


class Targeted(Divergence):
    """A loss that compares two distributions and sets the class of the label apart from the others.

    A row whose label is IGNORE_INDEX (an image without a label, or a token that the teacher's vocabulary does not have)
    takes the teacher's most probable class in its place.
    """

    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture})

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"] | None = None
    ) -> Float[Tensor, "rows"]:
        return self.divergence(student, self.whole(teacher), labels, **self.options())
