"""RolloutFigures: what the log says of the student's own text, and what is warned of."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kdlm.rollouts import EnvironmentSection, Written

logger = logging.getLogger(__name__)

GAP = 0.1
"""Nats: a mean difference between what engine and student give a fresh token that is more than rounding."""
FAR = 2.0
"""Nats a token between student and teacher, on the student's own text, at which a warm-up is advised."""

OTHER_WEIGHTS = (
    "the engine gives its tokens other probabilities than the student, by %.2f nats on average: it does not hold the "
    "student's weights, or computes in too coarse a type"
)
TOO_FAR = (
    "student and teacher are %.1f nats a token apart on the student's own text: policy gradients learn little there, "
    "and other methods more with a warm-up on the teacher's text (sequence_kd)"
)

Reduce = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Sums of this rank by name -> those over all ranks."""


class RolloutFigures:
    """Means over completions, until they are taken; and warnings, each said once.

    Args:
        environment: of the rollouts; None where a completion is one turn.
    """

    def __init__(self, environment: EnvironmentSection | None):
        self.environment = environment
        self._sums: dict[str, Tensor] = defaultdict(partial(torch.zeros, (2,), dtype=torch.float64))
        self._warned: set[str] = set()

    def add(self, name: str, value: float) -> None:
        """Take one value into the mean of this name."""
        self._sums[name] = self._sums[name] + torch.tensor([float(value), 1.0], dtype=torch.float64)

    def note(self, written: Sequence[Written]) -> None:
        """Take in how long completions are, whether they were cut, and what they are worth."""
        for one in written:
            self.add("length", one.drawn)
            self.add("truncated", one.completion.stop == "length")
            if one.reward is not None and not math.isnan(one.reward):
                self.add("reward", one.reward)
            if self.environment is not None:
                self.add("turns", len(one.rewards))
                self.add("success", one.rewards[-1] >= self.environment.success)

    def engine_gap(self, gap: float) -> None:
        """Take in by how many nats a fresh token's engine and student differ; warn where it is more than rounding."""
        self.add("engine_gap", gap)
        self._warn_once(gap > GAP, OTHER_WEIGHTS, gap)

    def apart(self, mean: float) -> None:
        """Warn where student and teacher begin too far apart for this to teach much; `mean` in nats a token."""
        self._warn_once(mean > FAR, TOO_FAR, mean)

    def taken(self, prefix: str, reduced: Reduce) -> dict[str, float]:
        """Return the means over all ranks, by name after `prefix`, and begin anew."""
        sums = reduced({f"{prefix}{name}": pair for name, pair in self._sums.items()})
        self._sums.clear()
        return {name: (total / count).item() for name, (total, count) in sums.items()}

    def _warn_once(self, wrong: bool, message: str, *values: float) -> None:
        if wrong and message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)
