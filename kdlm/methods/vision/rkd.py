"""Relational KD: the distances and angles between the images of a batch (CVPR 2019, arXiv 1904.05068)."""

from typing import ClassVar, Literal

from pydantic import Field

from kdlm.features import as_vector
from kdlm.gathering import gathered
from kdlm.losses import rkd_angle, rkd_distance
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.image_kd import Features, ImageKD, ImageOptions


class RKD(ImageKD):
    """Smooth L1 of the distances and of the angles between the embeddings of a batch.

    Images are compared with all others of their micro-batch, over all ranks: accumulating gradients over smaller
    batches is another loss. Angles make `batch^3` numbers.

    Args:
        losses: on logits, added to the relations.
        layer: the modules of student and teacher whose outputs are the embeddings; maps and tokens are averaged.
        distance_weight, angle_weight: factors on the means over images.
    """

    paper = "arXiv 1904.05068"

    def __init__(self, losses=(), *, layer, distance_weight=25.0, angle_weight=50.0):
        super().__init__(losses)
        self.ours, self.theirs = layer
        self.student_features, self.teacher_features = [self.ours], [self.theirs]
        self.relations = {"distance": (rkd_distance, distance_weight), "angle": (rkd_angle, angle_weight)}
        self.computes = tuple(name for name, (_, weight) in self.relations.items() if weight)

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        (student, teacher), own = gathered(as_vector(ours[self.ours]), as_vector(theirs[self.theirs]))
        return {
            name: Term(relation(student, teacher)[own].sum(), "images", weight)
            for name, (relation, weight) in self.relations.items()
            if weight
        }


class RKDSection(ImageOptions):
    """Match distances and angles between the images of a batch, beside the recipe's `losses`."""

    method: ClassVar = RKD
    name: Literal["rkd"] = "rkd"
    layer: tuple[str, str]
    """[student's module, teacher's module] whose outputs are the embeddings; maps and tokens are averaged."""
    distance_weight: float = Field(25.0, ge=0)
    """Weight of the distances."""
    angle_weight: float = Field(50.0, ge=0)
    """Weight of the angles, which make batch^3 numbers; 0 leaves them out."""
