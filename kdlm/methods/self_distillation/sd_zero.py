"""SD-Zero's second phase: a model learns to write at once what it would have written as its own reviser."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.losses import Loss, ReverseKL
from kdlm.methods.method import After, Batch, Told
from kdlm.methods.self_distillation.privileged import SelfDistillation
from kdlm.methods.tokens import TokenOptions
from kdlm.rollouts import Written
from kdlm.signal import Rows, sequence_of

RIGHT = "That is right. Rephrase it."
WRONG = "That is not correct. Start over."


class SDZero(SelfDistillation):
    """SD-Zero's second phase (arXiv 2604.12002): a divergence to the reviser, on the attempts that it would revise.

    `y ~ q(.|x)`, `sum_i D(p(.|x, y, c, y<i), q(.|x, y<i))`: the teacher has read the whole attempt and the control c
    that its reward calls for, and reads it again. Reverse KL by default, as the printed equation has it; the paper's
    prose says forward, which `losses` can name. The reviser is a self teacher, taken again between iterations:
    `teacher: {name: self, weights: snapshot, every: N}`. Control and first reading carry no loss. Attempts that were
    cut have no end after which anything could be said, and are left out, with those that have no reward.

    `loss_wrong` logs the part of the loss that falls on wrong attempts, `wrong` their share of the tokens.

    Args:
        success: reward from which on an attempt is right.
        right, wrong: the control of either, in the words that the reviser has learned.
    """

    paper = "arXiv 2604.12002"
    unit = "told"

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        success: float = 1.0,
        right: str = RIGHT,
        wrong: str = WRONG,
        **options: Any,
    ):
        super().__init__(losses or [ReverseKL()], **options)
        self.success, self.right, self.wrong = success, right, wrong

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"reward"}

    def told(self, written: Sequence[Written]) -> Sequence[Told]:
        return [self._control(one) for one in written]

    def _control(self, one: Written) -> Told:
        if one.reward is None or math.isnan(one.reward) or one.completion.stop == "length":
            return ""
        return After(self.right if one.reward >= self.success else self.wrong)

    def watch(self, values: Tensor, rows: Rows, batch: Batch) -> dict[str, Tensor]:
        wrong = (batch["reward"] < self.success)[rows.of_labels(sequence_of(batch))].to(values)
        return {"loss_wrong": values * wrong, "wrong": wrong}


class SDZeroSection(TokenOptions):
    """Learn to write what the reviser would have written, having read the attempt and whether it is right."""

    method: ClassVar = SDZero
    name: Literal["sd_zero"] = "sd_zero"
    success: float = 1.0
    """Reward from which on an attempt is right."""
    right: str = RIGHT
    """What the reviser is told after a right attempt: the words of the phase before."""
    wrong: str = WRONG
    """What it is told after a wrong one."""
    clip: float = Field(float("inf"), gt=0)
    """Largest value of a token's divergence, in nats; above it the token is not learned from."""
    importance_cap: float | None = Field(None, gt=0)
    """Weigh tokens by the student's probability now over that they were drawn with, up to this; `null`: all alike."""
