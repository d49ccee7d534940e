"""Re-calibration of captured top-k signals: FIRST (EMNLP 2024, arXiv 2408.12168).

A teacher that was fine-tuned on a task is often surer than it is right, and a student learns that too. FIRST captures a
few tokens a position, re-calibrates them, and distils from those. Here the mass of the tail stays what it was, and what
is re-calibrated is the distribution within the kept tokens; ranks stay what they were.

The released code divides probabilities, not log-probabilities, by its temperature, which no value makes the identity;
here it is the usual one.
"""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.section import Section
from kdlm.signal import TopK

BINS = 15


def tempered(log_probs: Float[Tensor, "rows k"], temperature: float) -> Float[Tensor, "rows k"]:
    """Return `mass * softmax(log p / temperature)`, as logarithms; above 1, the identity, the teacher is less sure."""
    mass = log_probs.logsumexp(-1, keepdim=True)
    return mass + (log_probs / temperature).log_softmax(-1)


def smoothed(log_probs: Float[Tensor, "rows k"], delta: float) -> Float[Tensor, "rows k"]:
    """Return p with `delta` taken from the most probable token and shared among the other k - 1, as logarithms.

    Where that would change the order of the first two, as much is taken as makes them equal. 0 is the identity.
    """
    k = log_probs.shape[-1]
    if k == 1 or delta == 0:
        return log_probs
    p = log_probs.exp()
    first = p.topk(2)
    most = (first.values[:, :1] - first.values[:, 1:]) * (k - 1) / k
    taken = most.clamp(max=delta)
    return (p + taken / (k - 1)).scatter_add(-1, first.indices[:, :1], -taken * k / (k - 1)).log()


def expected_calibration_error(confidence: Float[Tensor, "rows"], hit: Bool[Tensor, "rows"]) -> float:
    """Return the mean gap between confidence and accuracy over 15 bins of equal width, weighted by their rows."""
    place = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, place, confidence.double() - hit.double())
    return (gaps.abs().sum() / max(1, len(hit))).item()


class Calibration(Section):
    """How a captured top-k signal is re-calibrated."""

    identity: ClassVar[float]
    grid: ClassVar[tuple[float, ...]]
    """Values that are tried on the evaluation rows."""
    function: ClassVar[Callable[[Tensor, float], Tensor]]

    value: float | None

    def apply(self, log_probs: Float[Tensor, "rows k"], value: float) -> Float[Tensor, "rows k"]:
        """Return re-calibrated log-probabilities."""
        return type(self).function(log_probs, value)

    def chosen(self, held_out: Iterable[tuple[TopK, Int[Tensor, "rows"]]]) -> tuple[float, dict[float, float]]:
        """Return the value with the least calibration error of the first token on held-out rows, and all errors.

        `held_out` yields signals with the tokens that follow. Of equal ones the nearest to the identity is taken.
        """
        confidences: dict[float, list[Tensor]] = {value: [] for value in self.grid}
        hits = []
        for signal, labels in held_out:
            best = signal.log_probs.argmax(-1, keepdim=True)  # re-calibration does not move it
            hits.append(signal.ids.gather(-1, best).squeeze(-1) == labels)
            for value, found in confidences.items():
                found.append(self.apply(signal.log_probs, value).gather(-1, best).squeeze(-1).exp())
        if not hits:
            raise ValueError("calibration: there are no evaluation rows to choose its value on; set `value`")
        hit = torch.cat(hits)
        errors = {value: expected_calibration_error(torch.cat(found), hit) for value, found in confidences.items()}
        return min(errors, key=lambda value: (errors[value], abs(value - self.identity))), errors


class Temperature(Calibration):
    """Divide the kept log-probabilities by a temperature; their mass stays the same."""

    identity: ClassVar = 1.0
    grid: ClassVar = tuple(math.exp(step / 20) for step in range(-20, 31))
    function: ClassVar = staticmethod(tempered)

    name: Literal["temperature"] = "temperature"
    value: float | None = Field(None, gt=0)
    """Above 1 the teacher becomes less sure; by default the value with the least calibration error on `data.eval`."""


class LabelSmoothing(Calibration):
    """Take some probability from the most probable token and share it among the other kept ones."""

    identity: ClassVar = 0.0
    grid: ClassVar = tuple(step / 50 for step in range(26))
    function: ClassVar = staticmethod(smoothed)

    name: Literal["label_smoothing"] = "label_smoothing"
    value: float | None = Field(None, ge=0, lt=1)
    """Probability that is moved; by default the value with the least calibration error on `data.eval`."""


AnyCalibration = Annotated[Temperature | LabelSmoothing, Field(discriminator="name")]
