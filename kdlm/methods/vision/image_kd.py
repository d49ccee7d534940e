"""Distillation of image classifiers by the losses of language models: an image is a row, and its class the token."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses import IGNORE_INDEX, Loss, numbered_names, weighted_sum
from kdlm.losses.distributions import kl
from kdlm.methods.method import Batch, Method, Nets, Step, Term, Terms
from kdlm.methods.vision.robustness import Attacks
from kdlm.quality import calibration_sums, with_calibration_error
from kdlm.section import Section
from kdlm.signal import Dense

Features = dict[str, Any]
LOGITS = ""
"""Under which features hold the logits: the path of the network itself."""


class ImageKD(Method):
    """Sum losses over the images of a batch (Hinton et al. 2015, arXiv 1503.02531).

    Losses that look at labels alone are taken on the labelled images and divided by their number, those that listen to
    the teacher on all images. A subclass adds terms on features by `beside`, of the modules that it names.

    Args:
        losses: of the recipe, with their weights.
    """

    paper = "arXiv 1503.02531"
    paced_by = "images"
    unit = "images"
    """What the data provide, and all rows are counted by."""
    student_features: Sequence[str] = ()
    """Paths of the student's modules whose outputs `beside` gets."""
    teacher_features: Sequence[str] = ()
    """Paths of the teacher's."""
    attacks: Attacks | None = None
    """What evaluation tries the student with."""

    def __init__(self, losses: Sequence[Loss] = ()):
        self.image_losses = dict(zip(numbered_names(losses), losses, strict=True))

    @property
    def needs(self) -> frozenset[str]:
        listens = self.teacher_features or any(loss.needs_teacher for loss in self.image_losses.values())
        return frozenset({self.unit} | ({"teacher.classes"} if listens else set()))

    @property
    def leaves_unused(self) -> bool:
        return not self.image_losses  # what lies above the features

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        labels = batch["labels"]
        return {self.unit: torch.tensor(len(labels), device=labels.device), "labels": (labels != IGNORE_INDEX).sum()}

    def read(self, batch: Batch) -> Any:
        """Return what the networks are called with."""
        return batch["pixel_values"]

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        images, labels = self.read(batch), batch["labels"]
        teacher, theirs = self.ask_teacher(nets, images)
        student, ours = nets["student"].with_features(images, self.student_features)
        terms, metrics = self.compared(student, teacher, labels, step)
        ours, theirs = ours | {LOGITS: student}, theirs | {LOGITS: teacher}
        return Terms(terms | self.beside(nets, batch, ours, theirs, step), metrics)

    @torch.no_grad()
    def ask_teacher(self, nets: Nets, images: Any) -> tuple[Tensor | None, Features]:
        """Return the teacher's logits and features of the images, or nothing where it is not listened to."""
        if "teacher.classes" not in self.needs:
            return None, {}
        return nets["teacher"].with_features(images, self.teacher_features)

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        """Return terms on features, by name; `ours` are the student's, in its graph, `theirs` the teacher's.

        Both hold the logits too, under `LOGITS`.
        """
        return {}

    def compared(
        self,
        student: Float[Tensor, "images classes"],
        teacher: Float[Tensor, "images classes"] | None,
        labels: Int[Tensor, "images"],
        step: Step,
    ) -> tuple[dict[str, Term], dict[str, tuple[Tensor, str]]]:
        """Return the losses on logits as terms, one of labels and one of the teacher, and each loss as a metric."""
        terms, metrics = self.summed(student, None, labels, step)
        if teacher is None:
            return terms, metrics
        heard = self.summed(student, teacher, labels, step)
        return terms | heard[0], metrics | heard[1]

    def summed(
        self,
        student: Float[Tensor, "images classes"],
        teacher: Float[Tensor, "images classes"] | None,
        labels: Int[Tensor, "images"],
        step: Step,
    ) -> tuple[dict[str, Term], dict[str, tuple[Tensor, str]]]:
        """Return the term of the losses that listen to the teacher; without one, of those that look at labels."""
        name, unit = ("label_loss", "labels") if teacher is None else ("teacher_loss", self.unit)
        chosen = [
            (key, loss, loss.weight_at(step.progress, step.index))
            for key, loss in self.image_losses.items()
            if loss.needs_teacher == (teacher is not None)
        ]
        if not chosen:
            return {}, {}
        signal = None if teacher is None else Dense(teacher)
        total, parts = weighted_sum(chosen, Dense(student), signal, labels)
        return {name: Term(total.sum(), unit)}, {key: (parts[key].sum(), unit) for key, _, _ in chosen}

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms; by the labels accuracy, cross-entropy and calibration; what the teacher thinks.

        With `attacks`, also what is left of the accuracy on images that were changed to mislead the student.
        """
        terms = self.losses(nets, batch, frozenset(), step)
        images, labels = self.read(batch), batch["labels"]
        metrics = self.judged(
            self.answers(nets, images), nets["teacher"](images) if "teacher" in nets else None, labels
        )
        if self.attacks is not None:
            known = labels != IGNORE_INDEX
            tried = self.attacks.sums(partial(self.answers, nets), images[known], labels[known])
            metrics |= {name: (value, "labels") for name, value in tried.items()}
        return Terms(terms.terms, terms.metrics | metrics)

    def judged(
        self,
        student: Float[Tensor, "images classes"],
        teacher: Float[Tensor, "images classes"] | None,
        labels: Int[Tensor, "images"],
    ) -> dict[str, tuple[Tensor, str]]:
        """Return what is said of the student's logits, by the labels and, with its own, by the teacher."""
        log_q = student.float().log_softmax(-1)
        known = labels != IGNORE_INDEX
        correct = (log_q.argmax(-1) == labels)[known].sum()
        surprise = -log_q[known].gather(-1, labels[known, None]).sum()
        judged = {"accuracy": correct.float(), "cross_entropy": surprise}
        judged |= calibration_sums(log_q[known], labels[known])
        metrics = {name: (value, "labels") for name, value in judged.items()}
        if teacher is not None:
            log_p = teacher.float().log_softmax(-1)
            metrics["agreement"] = ((log_p.argmax(-1) == log_q.argmax(-1)).float().sum(), self.unit)
            metrics["kl_to_teacher"] = (kl(log_p, log_q).sum(), self.unit)
        return metrics

    def answers(self, nets: Nets, images: Any) -> Float[Tensor, "images classes"]:
        """Return the logits that the student is judged by."""
        return nets["student"](images)

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        return with_calibration_error(means)


class ImageOptions(Section):
    """What is common to methods on image classifiers. Every other field goes to the method by its name."""

    method: ClassVar[type[ImageKD]]
    """The method that this Section configures."""

    attacks: Attacks | None = None
    """Try the student in evaluation with images changed to mislead it."""

    def build(self, losses: Sequence[Loss], vocab: Any) -> ImageKD:
        """Return the method with the recipe's losses."""
        method = self.method(losses, **{key: value for key, value in self if key not in ("name", "attacks")})
        method.attacks = self.attacks
        return method


class ImageKDSection(ImageOptions):
    """Match the teacher's classes of images with the recipe's `losses`."""

    method: ClassVar = ImageKD
    name: Literal["image_kd"] = "image_kd"

    def build(self, losses, vocab) -> ImageKD:
        if not losses:
            raise ValueError("losses: image_kd needs at least one, e.g. [{name: forward_kl, temperature: 4}]")
        return super().build(losses, vocab)
