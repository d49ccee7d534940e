"""Generations within one run: the student goes on from where it is, and `previous` is what it was as the last ended."""

from dataclasses import dataclass

from pydantic import Field

from kdlm.methods.method import Step
from kdlm.methods.tokens import TokenOptions
from kdlm.roles import SnapshotOf


@dataclass(frozen=True)
class Generations:
    """How long a generation lasts: this many optimiser steps, or None for an epoch."""

    steps: int | None = None

    @property
    def previous(self) -> SnapshotOf:
        """The role that holds the student as it was when the last generation ended."""
        return SnapshotOf("student", None if self.steps is None else self._ends)

    def ended(self, step: Step) -> int:
        """Return how many generations are over."""
        return step.epoch if self.steps is None else step.index // self.steps

    def _ends(self, done: int) -> bool:
        return self.steps is not None and done % self.steps == 0


class InGenerations(TokenOptions):
    """What can be asked of any method whose student learns from its own last generation."""

    generation_steps: int | None = Field(None, ge=1)
    """Optimiser steps that a generation lasts; by default an epoch."""
