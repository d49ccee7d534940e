"""CRD: contrastive representation distillation (ICLR 2020, arXiv 1910.10699)."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdlm.diffusion import Draws
from kdlm.features import as_vector, width_of
from kdlm.gathering import gathered
from kdlm.losses import contrast_in_batch, contrast_with_bank
from kdlm.methods.method import Batch, Nets, Step, Term
from kdlm.methods.vision.bank import SIDES, Bank
from kdlm.methods.vision.image_kd import Features, ImageKD, ImageOptions
from kdlm.roles import Role, Trainable


class CRD(ImageKD):
    """Tell an image's embedding by the teacher from those of other images, and the student's likewise.

    A linear head on either side, the role `heads`, makes embeddings of length 1; heads are trained and checkpointed
    beside the student, never exported. Without `memory` the others are the rest of the micro-batch, over all ranks.
    With it they are drawn evenly from a bank of all training rows (`Bank`), by the row's `index`; the released code
    draws those of other classes only. Evaluation rows have no place in the bank, so evaluation leaves the term out.

    Args:
        losses: on logits, added to the contrast.
        layer: the modules of student and teacher whose outputs are embedded; maps and tokens are averaged.
        weight: factor on the mean over images.
        temperature: divides the products of embeddings.
        width: of the embeddings.
        memory: rows of the training data, for a bank of that size; None contrasts within the batch.
        negatives: drawn from the bank for each image and side.
        momentum: weight of what the bank held when a row is seen again.
        head_learning_rate: the heads' own rate; None follows the run.
    """

    paper = "arXiv 1910.10699"
    computes = ("contrast",)

    def __init__(
        self, losses=(), *, layer, weight=0.8, temperature=0.07, width=128,
        memory=None, negatives=16384, momentum=0.5, head_learning_rate=None,
    ):  # fmt: skip
        super().__init__(losses)
        self.ours, self.theirs = layer
        self.student_features, self.teacher_features = [self.ours], [self.theirs]
        self.weight, self.temperature, self.width = weight, temperature, width
        self.memory, self.negatives, self.momentum = memory, negatives, momentum
        self.head_learning_rate = head_learning_rate
        self.bank: Bank | None = None

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "heads": Trainable(self._heads, self.head_learning_rate)}

    def beside(self, nets: Nets, batch: Batch, ours: Features, theirs: Features, step: Step) -> dict[str, Term]:
        features = {"student": ours[self.ours], "teacher": theirs[self.theirs]}
        seen = {
            side: normalize(head(as_vector(features[side]).to(head.weight.dtype)), dim=-1)
            for side, head in nets["heads"].items()
        }
        if self.memory is None:
            (student, teacher), own = gathered(seen["student"], seen["teacher"])
            values = contrast_in_batch(student, teacher, temperature=self.temperature)[own]
        elif torch.is_grad_enabled():
            values = self._against_bank(seen, batch["index"], step)
        else:
            return {}
        return {"contrast": Term(values.sum(), "images", self.weight)}

    def _against_bank(self, seen: dict[str, Tensor], index: Tensor, step: Step) -> Tensor:
        if self.bank is None:
            self.bank = self._bank(step.seed)
        bank = self.bank
        drawn = Draws(index, step.seed, step.index).uniform("negatives", (self.negatives,))
        others = (drawn * (len(bank) - 1)).long()
        others = others + (others >= index[:, None])  # any row but the own
        values = torch.zeros(len(index), device=index.device)
        for side, opposite in (SIDES, SIDES[::-1]):
            values = values + contrast_with_bank(
                seen[side],
                bank.at(opposite, index),
                bank.at(opposite, others),
                log_partition=bank.log_partition.item(),
                bank=len(bank),
                temperature=self.temperature,
            )
        (places, *everyone), _ = gathered(index, *(seen[side].detach() for side in SIDES))
        bank.note(places, **dict(zip(SIDES, everyone, strict=True)))
        return values

    def _bank(self, seed: int) -> Bank:
        assert self.memory is not None
        return Bank(self.memory, self.width, momentum=self.momentum, temperature=self.temperature, seed=seed)

    def _heads(self, student: Any, teacher: Any) -> nn.ModuleDict:
        ours, theirs = student.probed([self.ours])[self.ours], teacher.probed([self.theirs])[self.theirs]
        widths = {"student": width_of(ours), "teacher": width_of(theirs)}
        return nn.ModuleDict({side: nn.Linear(width, self.width) for side, width in widths.items()})

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        if self.bank is not None:
            self.bank.take_up()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.bank is None else self.bank.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            self.bank = self._bank(0)
            self.bank.load_state_dict(state)


class CRDSection(ImageOptions):
    """Contrast the embeddings of student and teacher over images, beside the recipe's `losses`."""

    method: ClassVar = CRD
    name: Literal["crd"] = "crd"
    layer: tuple[str, str]
    """[student's module, teacher's module] whose outputs are embedded; maps and tokens are averaged."""
    weight: float = Field(0.8, ge=0)
    """Weight of the contrast."""
    temperature: float = Field(0.07, gt=0)
    """Divides the products of embeddings."""
    width: int = Field(128, ge=1)
    """Width of the embeddings."""
    memory: int | None = Field(None, ge=2)
    """Rows of the training data, for a bank of their embeddings to contrast with; by default the batch is the bank."""
    negatives: int = Field(16384, ge=1)
    """Drawn from the bank for each image and side: batch * negatives * width numbers."""
    momentum: float = Field(0.5, ge=0, lt=1)
    """Weight of what the bank held when a row is seen again."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the heads; by default the run's."""
