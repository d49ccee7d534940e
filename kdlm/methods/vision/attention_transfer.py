"""Attention transfer: the student looks where the teacher looks (ICLR 2017, arXiv 1612.03928)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kdlm.features import as_map
from kdlm.losses import attention_transfer
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.image_kd import Features, ImageKD, ImageOptions


class AttentionTransfer(ImageKD):
    """Mean squared difference of attention maps, `kdlm.losses.attention_transfer`, summed over pairs of modules.

    The maps have no channels, so nothing is learned beside the student. Tokens are laid out as a square.

    Args:
        losses: on logits, added to the maps' term.
        layers: (student's module, teacher's module) pairs of paths.
        weight: factor on the mean over images of the sum over pairs.
    """

    paper = "arXiv 1612.03928"
    computes = ("attention",)

    def __init__(self, losses=(), *, layers, weight=1000.0):
        super().__init__(losses)
        self.layers: list[tuple[str, str]] = [(ours, theirs) for ours, theirs in layers]
        self.student_features, self.teacher_features = zip(*self.layers, strict=True)
        self.weight = weight

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        stages = [attention_transfer(as_map(ours[s]), as_map(theirs[t])).sum() for s, t in self.layers]
        return {"attention": Term(torch.stack(stages).sum(), "images", self.weight)}


class AttentionTransferSection(ImageOptions):
    """Match where the networks look, the energy over channels of named modules, beside the recipe's `losses`."""

    method: ClassVar = AttentionTransfer
    name: Literal["attention_transfer"] = "attention_transfer"
    layers: list[tuple[str, str]] = Field(min_length=1)
    """[student's module, teacher's module] pairs, by their paths in the networks, one for each stage."""
    weight: float = Field(1000.0, ge=0)
    """Weight of the squared differences, which are summed over pairs."""
