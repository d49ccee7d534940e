"""How far a teacher agrees with itself under several contexts, and quantiles that are followed over a run."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.methods.sequences import group_rows
from kdlm.section import Section

TARGET = 0.95
"""The quantile of disagreements that weights of tokens are measured by."""
CAP = 10.0
"""Disagreement in those units above which more makes no difference."""
LEAST = 0.01
"""The least weight of a token."""


class Agreement(Section):
    """Weigh what the teacher says by how alike it is under the row's `contexts`: UniSD's first component."""

    per: Literal["token", "sequence"] = "token"
    """Give each token its weight, or all of a sequence the same."""
    statistic: Literal["variance", "range"] = "variance"
    """How far the log-probabilities of a token are from each other; of a sequence, their means over its tokens."""
    strength: float = Field(1.0, gt=0)
    """Of the weights: `1 / (1 + strength d)` of a token, d in units of the 0.95 quantile, `exp(-strength d)` of a
    sequence, d in nats."""


class Quantile:
    """A quantile of numbers that come in parts, over the whole run: one estimate, equal on all ranks.

    After each optimiser step it goes up where more than its share of the step's numbers was above it, and down where
    fewer were (Robbins and Monro, on the logarithm). It begins where the quantile of an exponential distribution with
    the first step's mean is. So it does not depend on how a step is cut into micro-batches, which the quantile of a
    micro-batch does.

    Args:
        share: of the numbers, below it.
    """

    rate = 0.1

    def __init__(self, share: float):
        self.share = share
        self.value = torch.tensor(float("nan"), dtype=torch.float64)

    @property
    def known(self) -> bool:
        """Whether a step has been seen."""
        return not bool(self.value.isnan())

    def follow(self, mean: Tensor, above: Tensor) -> None:
        """Take in a step: the mean of its numbers, and the share of them that was above."""
        rest = 1 - self.share
        if not self.known:
            first = mean.detach().cpu().double() * -math.log(max(rest, 1e-3))
            self.value = first if first > 0 else self.value
        else:
            gap = (above.detach().cpu().double() - rest) / max(rest, 1e-3)
            self.value = self.value * (self.rate * gap.clamp(max=20.0)).exp()


def disagreement(
    log_probs: Float[Tensor, "contexts rows"], agreement: Agreement, sequence: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Return how far the log-probabilities of each row are from each other: of its token, or of its sequence.

    Raises ValueError for fewer than two contexts.
    """
    if len(log_probs) < 2:
        raise ValueError(f"method.agreement: {len(log_probs)} `contexts` in a row, expected at least 2")
    if agreement.per == "sequence":
        group, lengths = group_rows(sequence)
        sums = log_probs.new_zeros(len(log_probs), len(lengths)).index_add(1, group, log_probs)
        means = sums / lengths
        apart = means.var(0, correction=0) if agreement.statistic == "variance" else means.amax(0) - means.amin(0)
        return apart[group]
    return log_probs.var(0) if agreement.statistic == "variance" else log_probs.amax(0) - log_probs.amin(0)


def agreement_weights(apart: Float[Tensor, "rows"], agreement: Agreement, scale: Quantile) -> Float[Tensor, "rows"]:
    """Return the weights of rows so far apart: 1 where all agree, and everywhere as long as the scale is not known."""
    if agreement.per == "sequence":
        return (-agreement.strength * apart).exp().clamp(min=1e-6)
    if not scale.known:
        return torch.ones_like(apart)
    units = (apart / scale.value.to(apart).clamp(min=1e-6)).clamp(max=CAP)
    return (1 / (1 + agreement.strength * units)).clamp(min=LEAST)
