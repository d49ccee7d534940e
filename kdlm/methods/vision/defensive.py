"""Defensive distillation (Papernot et al., S&P 2016, arXiv 1511.04508), which attacks on logits undo."""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.methods.method import Step
from kdlm.methods.vision.image_kd import ImageKD, ImageOptions


class DefensiveDistillation(ImageKD):
    """Compare at a high temperature and answer at 1: the student's logits grow by that factor.

    Both networks' logits are divided by the temperature before the losses see them, without a factor of its square. A
    teacher is trained by it with `cross_entropy`, then a student of the same kind with `forward_kl` to that teacher.
    At temperature 1 the student is so sure that the gradient of its cross-entropy is exactly 0 in float32 for many
    images: attacks that follow it (FGSM) have nothing to follow. That hides the gradient and removes no weakness;
    Carlini and Wagner (arXiv 1608.04644) attack logits, and succeed. Evaluate with `attacks`, which reports both.

    Args:
        losses: of the recipe.
        temperature: 20 to 100 in the paper.
    """

    paper = "arXiv 1511.04508"

    def __init__(self, losses=(), *, temperature=20.0):
        super().__init__(losses)
        self.temperature = temperature

    def compared(self, student: Tensor, teacher: Tensor | None, labels: Tensor, step: Step) -> Any:
        cooled = None if teacher is None else teacher / self.temperature
        return super().compared(student / self.temperature, cooled, labels, step)


class DefensiveSection(ImageOptions):
    """Train at a temperature and answer at 1; measure with `attacks` that this hides gradients and defends nothing."""

    method: ClassVar = DefensiveDistillation
    name: Literal["defensive"] = "defensive"
    temperature: float = Field(20.0, gt=0)
    """Divides the logits of both networks in training."""
