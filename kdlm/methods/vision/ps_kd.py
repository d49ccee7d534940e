"""PS-KD: progressive self-knowledge distillation (ICCV 2021, arXiv 2006.12000), of images."""

from typing import ClassVar, Literal

from kdlm.losses import cross_entropy, progressive_cross_entropy
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.self_distillation.ps_kd import Progressing, share_at
from kdlm.methods.vision.image_kd import ImageKD, ImageOptions
from kdlm.roles import Role, SnapshotOf, Trainable
from kdlm.signal import IGNORE_INDEX


class PSKD(ImageKD):
    """Cross-entropy to the label and what the student itself thought an epoch ago, ever more of the latter.

    The role `previous` is a copy of the student taken when an epoch ends, and is asked about the same images as the
    student is, with the same changes to them. The paper stores the predictions of the epoch's training passes; a copy
    costs a forward pass, needs no row numbers, and is the same under any sharding and after a resume. An image without
    a label has the second part alone.

    Args:
        losses: none, the target is the method's own.
        end: share of the earlier predictions in the last epoch.
    """

    paper = "arXiv 2006.12000"
    computes = ("label_loss", "previous_loss")

    def __init__(self, losses=(), *, end=0.8):
        super().__init__(losses)
        self.end = end

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images"})

    @property
    def leaves_unused(self) -> bool:
        return False

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "previous": SnapshotOf("student")}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        images, labels = batch["pixel_values"], batch["labels"]
        share, logits = share_at(step, self.end), nets["student"](images)
        terms = {"label_loss": Term(cross_entropy(logits, labels).sum(), "labels", 1 - share)}
        if share or not active:  # an evaluation names it always, and the first epoch has nobody to ask
            unknown = labels.new_full(labels.shape, IGNORE_INDEX)
            own = progressive_cross_entropy(logits, nets["previous"](images), unknown, share=1.0)
            terms["previous_loss"] = Term(own.sum(), "images", share)
        return Terms(terms)


class PSKDSection(Progressing, ImageOptions):
    """Learn from labels softened by the student's own predictions of an epoch ago; no teacher, no `losses`."""

    method: ClassVar = PSKD
    name: Literal["ps_kd"] = "ps_kd"
