"""On-policy distillation: the negative log-ratio to the teacher as the advantage of each sampled token."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import returns
from kdlm.methods.policy import PolicyMethod, PolicyOptions


class ReverseKLAdvantage(PolicyMethod):
    """Push each token that the student drew by the teacher's log-probability less the student's.

    `A_i = c (log p(y_i) - log q(y_i))`, held fixed; no discount, no baseline (Thinking Machines, "On-Policy
    Distillation", October 2025). The expected gradient is that of per-position reverse KL on the student's states, by
    a teacher that scores the sampled tokens and nothing else. The end token is scored like any other where it was
    drawn; a completion that was cut has none.

    IW-OPD (arXiv 2606.22600) multiplies A_i by `1 + g (1 - sum_{j < i} |A_j| / sum_j |A_j|)`, sums over the sequence:
    tokens before which student and teacher have parted count for less.

    Args:
        coefficient: c.
        prefix_weighting: g; 0 leaves it out, 0.5 is IW-OPD's.
    """

    paper = "Thinking Machines, October 2025; arXiv 2606.22600"

    def __init__(self, losses=(), *, coefficient=1.0, prefix_weighting=0.0, **options):
        super().__init__(losses, **options)
        self.coefficient, self.prefix_weighting = coefficient, prefix_weighting

    def advantages(self, rewards: Tensor, sequence: Tensor) -> Tensor:
        if not self.prefix_weighting:
            return self.coefficient * rewards
        size = rewards.abs()
        to_come = returns(size, sequence)  # with this token
        before = returns(size.flip(0), sequence.flip(0)).flip(0) - size
        left = to_come / (before + to_come).clamp(min=torch.finfo(size.dtype).tiny)
        return self.coefficient * rewards * (1 + self.prefix_weighting * left)


class ReverseKLAdvantageSection(PolicyOptions):
    """Push each sampled token by the teacher's log-probability less the student's."""

    method: ClassVar = ReverseKLAdvantage
    name: Literal["reverse_kl_advantage"] = "reverse_kl_advantage"
    coefficient: float = Field(1.0, gt=0)
    """Factor on the advantages."""
    prefix_weighting: float = Field(0.0, ge=0)
    """How much more the first tokens count than those after which student and teacher have parted; IW-OPD: 0.5."""
