"""Affinity mimicking: how alike images and texts are to the teacher (TinyCLIP, ICCV 2023, arXiv 2309.12314)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.gathering import gathered
from kdlm.losses import affinity, clip_loss
from kdlm.methods.method import Batch, Method, Nets, Step, Term, Terms
from kdlm.section import Section


class Affinity(Method):
    """`(1 - share) CLIP's loss + share * affinities` of student and teacher, dual encoders of images and texts.

    Pairs are compared with all others of their micro-batch, over all ranks: accumulating gradients over smaller batches
    is another loss. The embeddings may differ in width. The student's own scale is learned by CLIP's loss alone.

    Args:
        share: of mimicking; 1 leaves CLIP's loss out (the paper's recipes with a teacher), 0 the teacher.
        scale: what products of embeddings are multiplied by in the affinities, of both sides.
    """

    paper = "arXiv 2309.12314"
    paced_by = "pairs"

    def __init__(self, *, share: float = 1.0, scale: float = 50.0):
        self.share, self.scale = share, scale
        self.computes = tuple(name for name, weight in (("clip", 1 - share), ("affinity", share)) if weight)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"} | ({"teacher.embeddings"} if self.share else set()))

    @property
    def leaves_unused(self) -> bool:
        return self.share == 1  # the student's scale

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._compared(nets, batch, embeddings(nets["student"], batch))

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and `matched`: images whose nearest text of the batch is of their own class.

        Where rows have no `labels`, of their own row.
        """
        images, texts = embeddings(nets["student"], batch)
        terms = self._compared(nets, batch, (images, texts))
        own = batch.get("labels", torch.arange(len(images), device=images.device))
        matched = own[(images @ texts.T).argmax(-1)] == own
        return Terms(terms.terms, {"matched": (matched.float().sum(), "pairs")})

    def _compared(self, nets: Nets, batch: Batch, student: tuple[Tensor, Tensor]) -> Terms:
        (images, texts), own = gathered(*student)
        terms = {}
        if self.share < 1:
            values = clip_loss(images, texts, nets["student"].scale)
            terms["clip"] = Term(values[own].sum(), "pairs", 1 - self.share)
        if self.share > 0:
            with torch.no_grad():
                theirs = embeddings(nets["teacher"], batch)
            theirs, own = gathered(*theirs)
            values = affinity(images, texts, *theirs, scale=self.scale)
            terms["affinity"] = Term(values[own].sum(), "pairs", self.share)
        return Terms(terms)


def embeddings(encoder: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the embeddings of a batch's images and texts."""
    return encoder.images(batch["pixel_values"]), encoder.texts(batch["input_ids"], batch.get("attention_mask"))


class AffinitySection(Section):
    """Match the affinities of images and texts of two dual encoders, with or without CLIP's own loss."""

    name: Literal["affinity"] = "affinity"
    share: float = Field(1.0, ge=0, le=1)
    """Share of mimicking; the rest is CLIP's own loss. 0 asks no teacher."""
    scale: float = Field(50.0, gt=0)
    """What products of embeddings are multiplied by in the affinities, of both sides."""

    def build(self, losses: Sequence[Any], vocab: Any) -> Affinity:
        """Return the method. Raises ValueError when the recipe has token losses."""
        if losses:
            raise ValueError("losses: affinity has losses of its own: leave them out")
        return Affinity(share=self.share, scale=self.scale)
