"""USKD: universal self-knowledge distillation, soft labels without a teacher (ICCV 2023, arXiv 2303.13005)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kdlm.features import as_vector, width_of
from kdlm.losses import Loss, uskd
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.image_kd import LOGITS, Features, ImageKD, ImageOptions
from kdlm.roles import Role, Trainable
from kdlm.signal import IGNORE_INDEX

SMOOTHING = 0.1


class USKD(ImageKD):
    """Soften labels by how sure the student is, and rank the other classes by it and by a weak head in its middle.

    The weak head, one linear map of a feature's mean, is the role `weak`: trained and checkpointed beside the student,
    never exported. The target compares `q_y^2` with its mean over the batch; here that is the mean of the optimiser
    step before, over all its micro-batches and ranks, so that the gradient does not depend on how a batch is cut (at
    the first step, that of an even distribution). Images without a label are left out.

    Args:
        losses: on logits, added to the method's own; `cross_entropy` is what the paper adds.
        feature: path of the student's module that the weak head looks at.
        alpha: weight of the label's soft target.
        beta: of the other classes'.
        weak_weight: of the weak head's cross-entropy, with label smoothing 0.1.
    """

    paper = "arXiv 2303.13005"
    computes = ("uskd", "weak")
    follows = ("square",)

    def __init__(self, losses=(), *, feature, alpha=1.0, beta=0.1, weak_weight=0.005):
        super().__init__(losses)
        self.feature, self.student_features = feature, [feature]
        self.alpha, self.beta, self.weak_weight = alpha, beta, weak_weight
        self.mean_square = torch.tensor(float("nan"))

    @property
    def leaves_unused(self) -> bool:
        return False

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "weak": Trainable(self._weak_head)}

    def _weak_head(self, student: Any, teacher: Any) -> nn.Module:
        return nn.Linear(width_of(student.probed([self.feature])[self.feature]), student.num_classes)

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        labels, student, head = batch["labels"], ours[LOGITS], nets["weak"]
        weak = head(as_vector(ours[self.feature]).to(head.weight.dtype))
        mean = self.mean_square.to(student)
        mean = torch.where(mean.isnan(), student.shape[-1] ** -2, mean)
        own = uskd(student, weak.detach(), labels, mean_square=mean, alpha=self.alpha, beta=self.beta)
        learnt = cross_entropy(weak, labels, reduction="sum", ignore_index=IGNORE_INDEX, label_smoothing=SMOOTHING)
        return {"uskd": Term(own.sum(), "labels"), "weak": Term(learnt, "labels", self.weak_weight)}

    def compared(self, student: Tensor, teacher: Any, labels: Tensor, step: Step) -> Any:
        terms, metrics = super().compared(student, teacher, labels, step)
        known = labels != IGNORE_INDEX
        log_q = student.detach().float().log_softmax(-1)[known]
        square = (2 * log_q.gather(-1, labels[known, None])).exp().sum()
        return terms, metrics | {"square": (square, "labels")}

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        self.mean_square = means["square"].detach().float().cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean_square": self.mean_square}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean_square = state["mean_square"]


class USKDSection(ImageOptions):
    """Soften labels by the student's own sureness and a weak head in its middle; no teacher."""

    method: ClassVar = USKD
    name: Literal["uskd"] = "uskd"
    feature: str
    """Path of the student's module whose output, averaged over places or tokens, the weak head looks at."""
    alpha: float = Field(1.0, ge=0)
    """Weight of the label's soft target."""
    beta: float = Field(0.1, ge=0)
    """Weight of the other classes' targets."""
    weak_weight: float = Field(0.005, ge=0)
    """Weight of the weak head's own cross-entropy, with labels smoothed by 0.1."""

    def build(self, losses: Sequence[Loss], vocab: Any) -> ImageKD:
        if any(loss.needs_teacher for loss in losses):
            raise ValueError("losses: uskd has no teacher: cross_entropy alone makes sense beside it")
        return super().build(losses, vocab)
