"""CurioSFT's anchor: the label's log-probability is held near that of a reference that was softened token by token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.distributions import entropy_of, log_probs, widen
from kdlm.losses.loss import TeacherRows
from kdlm.losses.targeted import at
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Mixture

CERTAIN = 0.03
"""Nats of entropy up to which a token is softened least."""


@torch.no_grad()
def softening(
    reference: Float[Tensor, "*rows vocab"], *, low: float = 1.1, high: float = 1.5, top: int = 512, steps: int = 20
) -> Float[Tensor, "*rows"]:
    """Return the temperature of each row at which its entropy is `H + sigmoid(2 (H - 1.2)) / 2` (CurioSFT, ACL 2026).

    H is the entropy in nats at temperature 1. It and what the bisection looks at are those of the `top` largest logits
    alone, as in the released code; the answer lies within `2^-steps` of the range, and at an end of it where the
    wanted entropy cannot be reached. A row whose whole entropy is at most 0.03 gets `low`.
    """
    reference = widen(reference)
    largest = reference.topk(min(top, reference.shape[-1]), dim=-1).values

    def entropy(temperature: Tensor) -> Tensor:
        return entropy_of(torch.log_softmax(largest / temperature.unsqueeze(-1), dim=-1))

    below, above = (torch.full_like(largest[..., 0], end) for end in (low, high))
    now = entropy(torch.ones_like(below))
    wanted = now + torch.sigmoid(2 * (now - 1.2)) / 2
    for _ in range(steps):
        middle = (below + above) / 2
        short = entropy(middle) < wanted
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    certain = entropy_of(log_probs(reference, 1.0)) <= CERTAIN
    return torch.where(certain, low, (below + above) / 2)


def softened_anchor(
    student: Float[Tensor, "*rows vocab"],
    reference: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"],
    *,
    low: float = 1.1,
    high: float = 1.5,
) -> Float[Tensor, "*rows"]:
    """Return `(log q(y) - log p~(y))^2 / 2`, y the label and `p~ = softmax(reference / softening(reference))`.

    With cross-entropy beside it this is CurioSFT (ACL 2026). p~ is over the whole vocabulary, without gradient. The
    gradient is that of `log q(y)` times their difference: 0 where both give the label the same probability, and 0
    without a label (IGNORE_INDEX). It holds one probability a row, not the whole distribution.
    """
    label, log_q = labels.clamp(min=0), log_probs(student, 1.0)
    with torch.no_grad():
        theirs = widen(reference).to(log_q.dtype)
        log_p = log_probs(theirs / softening(theirs, low=low, high=high).unsqueeze(-1), 1.0)
    value = (at(log_q, label) - at(log_p, label)).square() / 2
    return torch.where(labels == IGNORE_INDEX, 0.0, value)


@dataclass(frozen=True)
class Softened:
    """`softened_anchor` as a term of `weighted_sum`."""

    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture})
    needs_teacher: ClassVar[bool] = True

    low: float = 1.1
    high: float = 1.5

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        if not isinstance(teacher, Tensor):
            given = "none" if teacher is None else f"a {type(teacher).__name__} signal"
            raise ValueError(f"curio_sft takes a reference that gives whole distributions, got {given}")
        return softened_anchor(student, teacher, labels, low=self.low, high=self.high)
