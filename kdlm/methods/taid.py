"""TAID: Temporally Adaptive Interpolated Distillation (ICLR 2025, arXiv 2501.16937)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.losses import TowardsTeacher
from kdlm.methods.method import Step
from kdlm.methods.tokens import TokenMethod, TokenOptions, Weighted


class Taid(TokenMethod):
    """Match a target that starts near the student and moves to the teacher: softmax((1 - t) sg[z_s] + t z_t).

    `t` grows by a linear ramp, and faster while the loss falls (the released code's update):

        change   = (previous - loss) / previous
        momentum = beta * momentum + (1 - beta) * change
        t        = min(end, max(start + (end - start) * progress, t + sigmoid(momentum) * alpha * (1 - t)))

    Three differences from the released code, each on purpose: the update runs once per optimiser step on the mean
    loss of all micro-batches and ranks (not on every micro-batch and rank by itself); evaluation never touches it; and
    the loss is the true divergence KL(target || student), whose relative change is not hidden by the target's entropy.
    The gradient is the same, target - student at the logits with the sign of descent.

    Args:
        losses: further token losses (e.g. cross_entropy), added to the TAID term.
        start, end: the range of t. 0.2 to 0.4 is a usual start; a wider capacity gap wants a smaller one.
        alpha: the largest adaptive growth of t per step.
        beta: momentum of the loss's relative change.
        adaptive: False leaves the linear ramp alone.
    """

    paper = "arXiv 2501.16937"
    needs = frozenset({"labels", "teacher"})

    def __init__(self, losses=(), *, start=0.4, end=1.0, alpha=5e-4, beta=0.99, adaptive=True, **options):
        super().__init__(losses, **options)
        self.start, self.end, self.alpha, self.beta = start, end, alpha, beta
        self.follows = ("taid",) if adaptive else ()
        self.t = torch.tensor(float(start))
        self.previous = torch.tensor(float("nan"))
        self.momentum = torch.tensor(0.0)

    def weighted(self, step: Step) -> list[Weighted]:
        return [("taid", TowardsTeacher(self.t), 1.0), *super().weighted(step)]

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        ramp = self.start + (self.end - self.start) * step.progress
        grown = self.t
        if "taid" in means:
            loss = means["taid"].to(self.t)
            change = (self.previous - loss) / (self.previous + 1e-15)
            seen = ~torch.isnan(change)  # the first step only stores the loss
            momentum = torch.where(seen, self.beta * self.momentum + (1 - self.beta) * change, self.momentum)
            growth = torch.sigmoid(momentum) * self.alpha * (1 - self.t)
            grown = torch.where(seen, self.t + growth, self.t)
            self.momentum, self.previous = momentum, loss
        self.t = grown.clamp(min=ramp, max=self.end)

    def state_dict(self) -> dict[str, Tensor]:
        return {"t": self.t, "previous": self.previous, "momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.t, self.previous, self.momentum = state["t"], state["previous"], state["momentum"]


class TaidSection(TokenOptions):
    """Match a target that moves from the student to the teacher as training goes on."""

    method: ClassVar = Taid
    name: Literal["taid"] = "taid"
    start: float = Field(0.4, ge=0, le=1)
    """Share of the teacher's logits in the target at the first step."""
    end: float = Field(1.0, ge=0, le=1)
    """Share of the teacher's logits in the target at the last step."""
    alpha: float = Field(5e-4, ge=0)
    """Largest adaptive growth of the share per step."""
    beta: float = Field(0.99, ge=0, lt=1)
    """Momentum of the loss's relative change, which drives the adaptive growth."""
    adaptive: bool = True
    """Let the share grow faster while the loss falls; false keeps the linear ramp alone."""

    @model_validator(mode="after")
    def _ordered(self) -> "TaidSection":
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) must not be below start ({self.start})")
        return self
