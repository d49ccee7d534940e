"""SCoRe: a model learns to correct itself, by rewards over two attempts and no word about the first."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.losses import ReverseKL
from kdlm.methods.method import Batch, Terms
from kdlm.methods.turns import TurnOptions, TurnRewards, discounted
from kdlm.signal import Rows, summed

KL = {1: 0.1, 2: 0.01}
"""The paper's factors on the KL to the start, by stage; stage 1 for mathematics (code: 0.25)."""


class SCoRe(TurnRewards):
    """Self-correction by reinforcement learning (arXiv 2409.12917), one of its two stages.

    `y1 ~ q(.|x)`, then a fixed request to try again, then `y2 ~ q(.|x, y1, request)`.

    1. maximise `E[r(y2)] - b KL(q(y1|x) || q_0(y1|x))`: the second attempt gets better while the first stays put;
    2. maximise `E[r(y1) + r(y2) + a (r(y2) - r(y1))] - b KL(q || q_0)`, the bonus for the second turn's tokens alone.

    q_0 is the teacher, `{name: self, weights: start}` in both. KL is taken over the vocabulary at each of the tokens
    that the student drew, and like the rewards summed over the episode. A turn's tokens are pushed by its own reward,
    less the group's mean; `discount` has the first turn's be pushed by the second's reward too, without the bonus.

    Shares of the episodes by right and wrong, first and then second attempt, are logged as `right_to_right`,
    `right_to_wrong`, `wrong_to_right`, `wrong_to_wrong`.

    From memory of the paper; its defaults agree with a public reproduction, which was not run. Our tests hold both
    stages' gradients and who is credited with what.

    Args:
        losses: none.
        stage: 1 or 2.
        bonus: a.
        kl: b; None is the paper's, 0 needs no teacher.
        success: reward from which on an attempt counts as right, in what is logged.
        options: as of `TurnRewards`.
    """

    paper = "arXiv 2409.12917"

    def __init__(
        self,
        losses=(),
        *,
        stage: Literal[1, 2] = 1,
        bonus: float = 10.0,
        kl: float | None = None,
        success: float = 1.0,
        **options: Any,
    ):
        if losses:
            raise ValueError("losses: score holds the student by method.kl, and takes none")
        kl = KL[stage] if kl is None else kl
        super().__init__([ReverseKL(weight=kl)] if kl else [], **options)
        self.stage, self.bonus, self.success = stage, bonus, success

    def worth(self, batch: Batch) -> Float[Tensor, "sequences turns"]:
        rewards = batch["turn_rewards"]
        if self.stage == 1:
            first = torch.zeros_like(rewards[:, :1]).where(~rewards[:, :1].isnan(), rewards[:, :1])
            return discounted(torch.cat([first, rewards[:, 1:]], 1), self.discount)
        worth = discounted(rewards, self.discount)
        return torch.cat([worth[:, :1], worth[:, 1:] + self.bonus * rewards.diff(dim=1)], 1)

    def compared(self, rows: Rows, batch: Batch) -> Bool[Tensor, "rows"]:
        drawn = super().compared(rows, batch)
        return drawn & (rows.of_labels(batch["turn"]) == 0) if self.stage == 1 else drawn

    def rewarded(self, log_q: Float[Tensor, "rows"], entropy: Float[Tensor, "rows"], rows: Rows, batch: Batch) -> Terms:
        found = super().rewarded(log_q, entropy, rows, batch)
        pairs = batch["turn_rewards"][:, :2]
        both = ~pairs.isnan().any(1) & (pairs.shape[1] == 2)
        weights = batch["weight"][both] if "weight" in batch else None
        pairs = pairs[both] if pairs.shape[1] == 2 else pairs.new_zeros(0, 2)
        names = {True: "right", False: "wrong"}
        right = pairs >= self.success
        moves = {
            f"{names[one]}_to_{names[two]}": summed((right[:, 0] == one) & (right[:, 1] == two), weights)
            for one in names
            for two in names
        }
        return Terms(found.terms, found.metrics | {name: (count, "completions") for name, count in moves.items()})


class SCoReSection(TurnOptions):
    """Learn to correct oneself: two attempts at every prompt (`rollouts.environment` retry, `until_right: false`)."""

    method: ClassVar = SCoRe
    name: Literal["score"] = "score"
    stage: Literal[1, 2] = 1
    """1 rewards the second attempt and holds the first where it was; 2 rewards both, and a second that is better."""
    bonus: float = Field(10.0, ge=0)
    """In stage 2: factor on the second attempt's reward less the first's, for the second turn's tokens."""
    kl: float | None = Field(None, ge=0)
    """Factor on the KL to the teacher (`{name: self, weights: start}`), at the first turn's tokens in stage 1, at all
    in stage 2. By default 0.1 and 0.01; 0 needs no teacher."""
    success: float = 1.0
    """Reward from which on an attempt counts as right, in what is logged."""

    @model_validator(mode="after")
    def _of_use(self) -> "SCoReSection":
        if self.stage == 1 and "bonus" in self.model_fields_set:
            raise ValueError("bonus does nothing in stage 1: leave it out")
        return self
