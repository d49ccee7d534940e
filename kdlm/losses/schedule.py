"""Schedules: a number that moves over training, such as the weight of a loss.

`progress` is the share of training that is done, in [0, 1]; `step` counts optimiser steps from 0. Both are the same
on every rank and after a resume, so a schedule has no state.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdlm.section import Section


class Constant(Section):
    """One value from beginning to end."""

    name: Literal["constant"] = "constant"
    level: float = Field(ge=0)
    """The value."""

    def value(self, progress: float, step: int) -> float:
        return self.level


class _Ramp(Section):
    """From `start` to `end` between two moments of training, still before and after."""

    start: float = Field(ge=0)
    """Value until `begin`."""
    end: float = Field(ge=0)
    """Value from `until` on."""
    begin: float = Field(0.0, ge=0, le=1)
    """Progress, in [0, 1], at which the value begins to move."""
    until: float = Field(1.0, ge=0, le=1)
    """Progress, in [0, 1], at which the value has arrived."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.begin < self.until:
            raise ValueError(f"begin ({self.begin}) must lie before until ({self.until})")
        return self

    def _share(self, progress: float) -> float:
        return min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))


class Linear(_Ramp):
    """A straight line from `start` to `end`."""

    name: Literal["linear"] = "linear"

    def value(self, progress: float, step: int) -> float:
        return self.start + (self.end - self.start) * self._share(progress)


class Cosine(_Ramp):
    """Half a cosine wave from `start` to `end`: flat at both ends."""

    name: Literal["cosine"] = "cosine"

    def value(self, progress: float, step: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self._share(progress))) / 2


class Step(Section):
    """Jumps: `values[0]` first, `values[i]` from `at[i-1]` on. Forward KL, then reverse KL: `[1, 0]` and `[0, 1]`."""

    name: Literal["step"] = "step"
    values: list[Annotated[float, Field(ge=0)]] = Field(min_length=2)
    """One value more than there are jumps."""
    at: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Moments of the jumps, rising."""
    unit: Literal["progress", "step"] = "progress"
    """Whether `at` counts the share of training, in [0, 1], or optimiser steps."""

    @model_validator(mode="after")
    def _matched(self) -> Self:
        if len(self.values) != len(self.at) + 1:
            raise ValueError(f"{len(self.at)} jumps need {len(self.at) + 1} values, got {len(self.values)}")
        if any(a >= b for a, b in pairwise(self.at)):
            raise ValueError(f"at must rise, got {self.at}")
        if self.unit == "progress" and self.at[-1] > 1:
            raise ValueError(f"at counts progress in [0, 1], got {self.at[-1]}: set unit: step to count steps")
        return self

    def value(self, progress: float, step: int) -> float:
        now = progress if self.unit == "progress" else step
        return self.values[sum(now >= moment for moment in self.at)]


Schedule = Annotated[Constant | Linear | Cosine | Step, Field(discriminator="name")]
Weight = Annotated[float, Field(ge=0)] | Schedule


def value_at(weight: Weight, progress: float, step: int) -> float:
    """Return what a weight is worth now: itself, or what its schedule says."""
    return weight if isinstance(weight, int | float) else weight.value(progress, step)
