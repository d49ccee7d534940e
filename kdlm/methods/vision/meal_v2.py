"""MEAL V2: the mean of several teachers, and a discriminator of whose answer it is (2020, arXiv 2009.08453)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from kdlm.losses import ForwardKL, Loss
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.image_kd import LOGITS, Features, ImageKD, ImageOptions
from kdlm.roles import Role, Trainable

Adversarial = Literal["none", "released", "reversed"]


class MEALV2(ImageKD):
    """Forward KL at temperature 1 to the mean of the teachers (`image_ensemble`), without labels; a discriminator.

    The discriminator, a small perceptron on log-probabilities, the role `discriminator`, learns to tell the teacher's
    answers from the student's. `released`: the student minimises its loss too, and so helps it, which is what the
    released code does. `reversed`: the student gets that gradient with the sign turned, as an adversary would. Here it
    sees log-probabilities, since the mean of teachers has no logits, and its last layer has no ReLU.

    Args:
        losses: forward KL where there are none.
        adversarial: `none` (no discriminator), `released` or `reversed`.
        weight: factor on the discriminator's mean over images.
        discriminator_learning_rate: its own rate; None follows the run.
    """

    paper = "arXiv 2009.08453"

    def __init__(self, losses=(), *, adversarial: Adversarial = "none", weight=1.0, discriminator_learning_rate=None):
        super().__init__(losses or [ForwardKL()])
        self.adversarial, self.weight = adversarial, weight
        self.discriminator_learning_rate = discriminator_learning_rate
        self.computes = () if adversarial == "none" else ("discriminator",)

    @property
    def roles(self) -> dict[str, Role]:
        own = Trainable(self._discriminator, self.discriminator_learning_rate)
        return {"student": Trainable(), **({} if self.adversarial == "none" else {"discriminator": own})}

    def _discriminator(self, student: Any, teacher: Any) -> nn.Module:
        classes = student.num_classes
        first, second = max(8, classes // 8), max(8, classes // 64)
        return nn.Sequential(
            nn.Linear(classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
        )

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        if self.adversarial == "none":
            return {}
        student, teacher = (logits.log_softmax(-1) for logits in (ours[LOGITS], theirs[LOGITS]))
        if self.adversarial == "reversed":
            student = _Reversed.apply(student)
        of_student, of_teacher = nets["discriminator"](student), nets["discriminator"](teacher.to(student))
        total = softplus(of_student) + softplus(-of_teacher)  # binary cross-entropy, teacher 1, student 0
        return {"discriminator": Term(total.sum(), "images", self.weight)}


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -gradient


class MEALV2Section(ImageOptions):
    """Match the mean of several teachers without labels, with or without a discriminator of student and teachers."""

    method: ClassVar = MEALV2
    name: Literal["meal_v2"] = "meal_v2"
    adversarial: Adversarial = "none"
    """What the discriminator's gradient does to the student: `none` is no discriminator, `released` lets the student
    help it, as the released code does, `reversed` work against it."""
    weight: float = Field(1.0, ge=0)
    """Weight of the discriminator's loss."""
    discriminator_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the discriminator; by default the run's."""

    def build(self, losses: Sequence[Loss], vocab: Any) -> ImageKD:
        if self.adversarial == "none" and {"weight", "discriminator_learning_rate"} & self.model_fields_set:
            raise ValueError("method.adversarial: none has no discriminator: leave its weight and learning rate out")
        return super().build(losses, vocab)
