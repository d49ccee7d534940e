"""Cross-entropy on the data's own tokens: the loss without a teacher."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.distributions import widen
from kdlm.losses.loss import Loss, TeacherRows
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Mixture, Sampled, TopK


def cross_entropy(student: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return `-log q(label)` of each row, in nats; 0 where the label is IGNORE_INDEX."""
    rows = torch.nn.functional.cross_entropy(
        widen(student).flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    return rows.view(labels.shape)


class CrossEntropy(Loss):
    """Next-token cross-entropy on the labels of the data."""

    name: Literal["cross_entropy"] = "cross_entropy"
    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture, TopK, Sampled})
    needs_teacher: ClassVar[bool] = False
    full_vocabulary: ClassVar[bool] = True

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        return cross_entropy(student, labels)
