"""DMAE: a masked autoencoder whose middle features follow a larger one's (CVPR 2023, arXiv 2208.12256)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdlm.diffusion import Draws
from kdlm.methods.method import Batch, Method, Nets, Step, Term, Terms, rows_in
from kdlm.roles import Role, Trainable
from kdlm.section import Section

DEPTH = 2 / 3


class DMAE(Method):
    """Pixels of the hidden patches, and the L1 distance between features of the seen ones.

    The student fills in what is hidden; its features at one block, through a projector of two layers, meet the
    teacher's, both at length 1. The teacher sees what the student sees, and is run only as far as its block. The
    distance is the mean over tokens, that of the class among them, of the sum over channels: how the released code
    reduces it was not verified. The projector is a role of its own, never exported.

    Args:
        blocks: (student's, teacher's) block, 0 is the first; None takes both at two thirds of the depth. The paper has
            the eighth of 12 and the seventeenth of 24.
        weight: factor on the mean distance; 0 asks no teacher (plain masked autoencoding).
        projector_learning_rate: its own; None follows the run.
    """

    paper = "arXiv 2208.12256"
    paced_by = "images"

    def __init__(
        self,
        *,
        blocks: tuple[int, int] | None = None,
        weight: float = 1.0,
        projector_learning_rate: float | None = None,
    ):
        self.blocks, self.weight, self.projector_learning_rate = blocks, weight, projector_learning_rate
        self.computes = ("pixels", "features") if weight else ("pixels",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"images"} | ({"teacher.masked"} if self.weight else set()))

    @property
    def roles(self) -> dict[str, Role]:
        if not self.weight:
            return {"student": Trainable()}
        return {"student": Trainable(), "projector": Trainable(self._projector, self.projector_learning_rate)}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"images": rows_in(batch)}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._compared(nets, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms; the same patches are hidden at every evaluation."""
        return self._compared(nets, batch, Step(0, step.total, step.epoch, step.seed))

    def _compared(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        images, student = batch["pixel_values"], nets["student"]
        noise = Draws(batch["index"], step.seed, step.index).uniform("mask", (student.patches,))
        block = 0 if not self.weight else self._mapped(student, nets["teacher"])[0]
        errors, ours = student.reconstructed(images, noise, block)
        terms = {"pixels": Term(errors.sum(), "images")}
        if self.weight:
            with torch.no_grad():
                theirs = nets["teacher"].encoded(images, noise, self._mapped(student, nets["teacher"])[1])
            terms["features"] = Term(distance(nets["projector"](ours), theirs).sum(), "images", self.weight)
        return Terms(terms)

    def _mapped(self, student: Any, teacher: Any) -> tuple[int, int]:
        if self.blocks is None:
            self.blocks = (math.ceil(student.num_blocks * DEPTH) - 1, math.ceil(teacher.num_blocks * DEPTH) - 1)
        return self.blocks

    def _projector(self, student: Any, teacher: Any) -> nn.Module:
        """Return a projector. Raises ValueError where the two do not see the same patches, or for a block too high."""
        for key in ("patches", "mask_ratio"):
            if getattr(student, key) != getattr(teacher, key):
                raise ValueError(
                    f"teacher: its {key} is {getattr(teacher, key)}, the student's {getattr(student, key)}: "
                    "both must see the same patches"
                )
        blocks = self._mapped(student, teacher)
        if blocks[0] >= student.num_blocks or blocks[1] >= teacher.num_blocks:
            raise ValueError(
                f"method.blocks: {list(blocks)} is out of range: the student has {student.num_blocks} blocks, "
                f"the teacher {teacher.num_blocks}"
            )
        wide = teacher.hidden_size
        return nn.Sequential(nn.Linear(student.hidden_size, wide), nn.GELU(), nn.Linear(wide, wide))


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return for each row the L1 distance of its tokens, each brought to length 1: mean over tokens."""
    apart = normalize(student.float(), dim=-1) - normalize(teacher.detach().float(), dim=-1)
    return apart.abs().sum(-1).mean(-1)


class DMAESection(Section):
    """Masked autoencoding, with features that follow a larger autoencoder's."""

    name: Literal["dmae"] = "dmae"
    blocks: tuple[int, int] | None = None
    """[student's, teacher's] block, counted from 0; by default both at two thirds of the depth."""
    weight: float = Field(1.0, ge=0)
    """Weight of the features' distance; 0 asks no teacher."""
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the projector; by default the run's."""

    def build(self, losses: Sequence[Any], vocab: Any) -> DMAE:
        """Return the method. Raises ValueError when the recipe has token losses."""
        if losses:
            raise ValueError("losses: dmae has losses of its own: leave them out")
        return DMAE(**{key: value for key, value in self if key != "name"})
