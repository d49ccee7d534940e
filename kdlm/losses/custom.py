"""The way in for a loss of your own."""

from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.loss import Loss, TeacherRows
from kdlm.section import Custom
from kdlm.signal import Dense, Hidden, Mixture, Sampled, TopK


class CustomLoss(Custom, Loss):
    """Your own function `(student_logits [rows, vocab], teacher, labels [rows], **args) -> [rows]`.

    It is written eagerly, in plain torch; chunking and gradients come from kdlm. `teacher` is logits `[rows, vocab]`
    without gradient, or a `TopK` or `Sampled` where the teacher gives that. `labels` count the columns of the logits:
    where the vocabularies differ, those are the shared ids, and a label that is none of them is IGNORE_INDEX.
    """

    name: Literal["custom"] = "custom"
    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture, TopK, Sampled})

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: TeacherRows, labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        return self.load()(student, teacher, labels, **self.args)
