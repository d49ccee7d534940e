"""OFA-KD: the student's stages learn the teacher's classes, whatever the architectures (arXiv 2310.19444)."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdlm.features import as_map, as_vector, width_of
from kdlm.losses import ofa
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.image_kd import LOGITS, Features, ImageKD, ImageOptions
from kdlm.roles import Role, Trainable


class Branch(nn.Module):
    """Logits from the features of one stage: a hidden layer, the mean over places, a linear layer.

    Over maps, and tokens laid out as one, the hidden layer is a depthwise-separable convolution; over vectors it is
    linear. Normalised within an image, not over the batch, so that how a batch is cut is inert.

    Args:
        feature: the stage's, for its kind and width.
        classes: how many.
    """

    def __init__(self, feature: Tensor, classes: int):
        super().__init__()
        self.width = width_of(feature)
        self.hidden = self._convolution(self.width) if feature.dim() > 2 else nn.Linear(self.width, self.width)
        self.norm = nn.GroupNorm(1, self.width)
        self.classes = nn.Linear(self.width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        x = feature if feature.dim() == 2 else as_map(feature)
        return self.classes(as_vector(self.norm(self.hidden(x.to(self.classes.weight.dtype))).relu()))

    @staticmethod
    def _convolution(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.Conv2d(width, width, 1, bias=False)
        )


class OFAKD(ImageKD):
    """Cross-entropy to the teacher, strengthened at the label, from a branch on each of the student's stages.

    The teacher gives logits alone, so any pair of architectures will do. Branches are a role of their own: trained and
    checkpointed beside the student, never exported. The student's own logits are the recipe's `losses`: the paper's
    whole loss has `cross_entropy` and `ofa` there, each of weight 1. The paper's branches are deeper, of one kind for
    each architecture.

    Args:
        losses: on the student's own logits.
        stages: paths of the student's modules that a branch reads.
        eps: as in `kdlm.losses.ofa`, of the stages.
        weight: factor on the mean over images of the sum over stages.
        branch_learning_rate: the branches' own rate; None follows the run.
    """

    paper = "arXiv 2310.19444"
    computes = ("stages",)

    def __init__(self, losses=(), *, stages, eps=1.0, weight=1.0, branch_learning_rate=None):
        super().__init__(losses)
        self.student_features = list(stages)
        self.eps, self.weight, self.branch_learning_rate = eps, weight, branch_learning_rate

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"teacher.classes"}

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "branches": Trainable(self._branches, self.branch_learning_rate)}

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        stages = [
            ofa(branch(ours[stage]), theirs[LOGITS], batch["labels"], eps=self.eps).sum()
            for stage, branch in zip(self.student_features, nets["branches"], strict=True)
        ]
        return {"stages": Term(torch.stack(stages).sum(), "images", self.weight)}

    def _branches(self, student: Any, teacher: Any) -> nn.ModuleList:
        features = student.probed(self.student_features)
        return nn.ModuleList(Branch(features[stage], student.num_classes) for stage in self.student_features)


class OFAKDSection(ImageOptions):
    """Teach every stage of the student the teacher's classes through branches, beside the recipe's `losses`."""

    method: ClassVar = OFAKD
    name: Literal["ofa_kd"] = "ofa_kd"
    stages: list[str] = Field(min_length=1)
    """Paths of the student's modules that a branch reads, usually the end of each stage."""
    eps: float = Field(1.0, ge=1)
    """How much more the label weighs in the stages than the teacher gives it; 1 is the teacher itself."""
    weight: float = Field(1.0, ge=0)
    """Weight of the stages' cross-entropies, which are summed."""
    branch_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the branches; by default the run's."""
