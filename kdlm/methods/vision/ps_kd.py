"""PS-KD: progressive self-knowledge distillation (ICCV 2021, arXiv 2006.12000), of images and of text."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdlm.losses import CrossEntropy, Loss, cross_entropy, kept_rows, progressive_cross_entropy
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.methods.vision.image_kd import ImageKD, ImageOptions
from kdlm.roles import Role, SnapshotOf, Trainable
from kdlm.section import Section
from kdlm.signal import IGNORE_INDEX

ROLES: dict[str, Role] = {"student": Trainable(), "previous": SnapshotOf("student")}


def share_at(step: Step, end: float) -> float:
    """Return the share of the student's own earlier predictions in the target: `end e / E`, e epochs of E done."""
    return end * min(step.epoch, step.epochs) / step.epochs


class PSKD(ImageKD):
    """Cross-entropy to the label and what the student itself thought an epoch ago, ever more of the latter.

    The role `previous` is a copy of the student taken when an epoch ends, and is asked about the same images as the
    student is, with the same changes to them. The paper stores the predictions of the epoch's training passes; a copy
    costs a forward pass, needs no row numbers, and is the same under any sharding and after a resume. An image without
    a label has the second part alone.

    Args:
        losses: none, the target is the method's own.
        end: share of the earlier predictions that the last epoch would end at.
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
        return ROLES

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        images, labels = batch["pixel_values"], batch["labels"]
        share, logits = share_at(step, self.end), nets["student"](images)
        terms = {"label_loss": Term(cross_entropy(logits, labels).sum(), "labels", 1 - share)}
        if share or not active:  # an evaluation names it always, and the first epoch has nobody to ask
            unknown = labels.new_full(labels.shape, IGNORE_INDEX)
            own = progressive_cross_entropy(logits, nets["previous"](images), unknown, share=1.0)
            terms["previous_loss"] = Term(own.sum(), "images", share)
        return Terms(terms)


class _EarlierSelf(Section):
    end: float = Field(0.8, ge=0, lt=1)
    """Share of the earlier predictions in the target after the last epoch; it grows from 0 in even steps."""

    def build(self, losses: Sequence[Loss], vocab: Any) -> Any:
        if losses:
            raise ValueError(f"losses: {self.name} has a loss of its own: leave them out")
        return super().build(losses, vocab)


class PSKDSection(_EarlierSelf, ImageOptions):
    """Learn from labels softened by the student's own predictions of an epoch ago; no teacher, no `losses`."""

    method: ClassVar = PSKD
    name: Literal["ps_kd"] = "ps_kd"


class TokenPSKD(TokenMethod):
    """Cross-entropy to the next token and what the student itself thought of it an epoch ago: PS-KD of text.

    As `PSKD`: the role `previous`, a copy of the student taken when an epoch ends, scores the same text again.

    Args:
        losses: none, the target is the method's own.
        end: share of the earlier predictions that the last epoch would end at.
    """

    paper = "arXiv 2006.12000"
    needs = frozenset({"labels"})

    def __init__(self, losses=(), *, end=0.8, **options):
        super().__init__(losses, **options)
        self.end = end

    @property
    def roles(self) -> dict[str, Role]:
        return ROLES

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"])
        share, student = share_at(step, self.end), nets["student"](batch, rows)
        if not share:
            return self.compare(student, None, rows, step, weighted=[("ps_kd", CrossEntropy(), 1.0)])
        target = ("ps_kd", partial(_softened, share=share), 1.0)
        return self.compare(student, nets["previous"](batch, rows), rows, step, weighted=[target])

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own loss and cross-entropy."""
        rows = kept_rows(batch["labels"])
        plain = self.compare(nets["student"](batch, rows), None, rows, step, ("cross_entropy",), [])
        terms = self.losses(nets, batch, frozenset(), step)
        return Terms(terms.terms, terms.metrics | plain.metrics)


def _softened(student: Any, previous: Any, labels: Any, *, share: float) -> Any:
    return progressive_cross_entropy(student, previous, labels, share=share)


class TokenPSKDSection(_EarlierSelf, TokenOptions):
    """Learn from next tokens softened by the student's own predictions of an epoch ago; no teacher, no `losses`."""

    method: ClassVar = TokenPSKD
    name: Literal["token_ps_kd"] = "token_ps_kd"
