"""FitNet: the student's features follow the teacher's through a learned projector (ICLR 2015, arXiv 1412.6550)."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from kdlm.features import aligned, width_of
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.image_kd import Features, ImageKD, ImageOptions
from kdlm.roles import Role, Trainable


class FitNet(ImageKD):
    """Mean squared error between projected features of the student and features of the teacher, summed over pairs.

    Both are brought to the same places (`kdlm.features.aligned`: the larger map is averaged down), and a linear map of
    the channels, a convolution of 1 x 1, makes the student's as wide as the teacher's. The projectors are a role of
    their own: trained and checkpointed beside the student, never exported. The paper trains the lower layers alone
    first; here all is one stage, as in the benchmarks that followed.

    Args:
        losses: on logits, added to the features' term.
        layers: (student's module, teacher's module) pairs of paths.
        weight: factor on the mean over images of the sum over pairs.
        projector_learning_rate: the projectors' own rate; None follows the run.
    """

    paper = "arXiv 1412.6550"
    computes = ("features",)

    def __init__(self, losses=(), *, layers, weight=100.0, projector_learning_rate=None):
        super().__init__(losses)
        self.layers: list[tuple[str, str]] = [(ours, theirs) for ours, theirs in layers]
        self.student_features, self.teacher_features = zip(*self.layers, strict=True)
        self.weight, self.projector_learning_rate = weight, projector_learning_rate

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "projectors": Trainable(self._projectors, self.projector_learning_rate)}

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        errors = []
        for (student, teacher), projector in zip(self.layers, nets["projectors"], strict=True):
            found, wanted = aligned(ours[student], theirs[teacher])
            found = projector(found.to(projector.weight.dtype)).float()
            errors.append((found - wanted.detach().float()).square().mean((1, 2)).sum())
        return {"features": Term(torch.stack(errors).sum(), "images", self.weight)}

    def _projectors(self, student: Any, teacher: Any) -> nn.ModuleList:
        ours, theirs = student.probed(self.student_features), teacher.probed(self.teacher_features)
        return nn.ModuleList(nn.Linear(width_of(ours[s]), width_of(theirs[t])) for s, t in self.layers)


class FitNetSection(ImageOptions):
    """Match features of named modules through learned projectors, beside the recipe's `losses`."""

    method: ClassVar = FitNet
    name: Literal["fitnet"] = "fitnet"
    layers: list[tuple[str, str]] = Field(min_length=1)
    """[student's module, teacher's module] pairs, by their paths in the networks: `layer1.0`, `vit.layers.5`."""
    weight: float = Field(100.0, ge=0)
    """Weight of the mean squared error, which is summed over pairs."""
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the projectors; by default the run's."""
