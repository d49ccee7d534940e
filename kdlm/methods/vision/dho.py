"""DHO: dual-head optimisation, labels and the teacher each with a head of their own (2025, arXiv 2505.07675)."""

from typing import Any, ClassVar, Literal

from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.vision.image_kd import ImageKD, ImageOptions


class DHO(ImageKD):
    """Losses on labels go to the classifier's own head, losses that listen to the teacher to the second one.

    The heads share the features and nothing else, so that what few labels say and what the teacher says of all images
    do not pull on one set of logits. The student is a `kdlm.models.DualHead`, whose answer mixes both.

    Args:
        losses: `cross_entropy` and `forward_kl` at temperature 2 where there are none.
    """

    paper = "arXiv 2505.07675"

    def __init__(self, losses=()):
        super().__init__(losses or [CrossEntropy(), ForwardKL(temperature=2.0)])
        kinds = {loss.needs_teacher for loss in self.image_losses.values()}
        self.computes = tuple(("label_loss", "teacher_loss")[kind] for kind in sorted(kinds))

    @property
    def leaves_unused(self) -> bool:
        return len(self.computes) < 2  # a head

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        student: Any = getattr(nets["student"], "module", None)
        if not hasattr(student, "heads"):
            raise ValueError("student: dho trains two heads: use {name: dual_head, of: ..., feature: ...}")
        images, labels = batch["pixel_values"], batch["labels"]
        own, second = student.heads(images)
        terms, metrics = self.summed(own, None, labels, step)
        teacher, _ = self.ask_teacher(nets, images)
        heard = ({}, {}) if teacher is None else self.summed(second, teacher, labels, step)
        return Terms(terms | heard[0], metrics | heard[1])


class DHOSection(ImageOptions):
    """Learn from few labels and from a teacher in two heads (student `dual_head`), which are mixed to answer."""

    method: ClassVar = DHO
    name: Literal["dho"] = "dho"
