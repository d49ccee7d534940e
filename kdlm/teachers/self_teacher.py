"""The student as its own teacher: as it is now, as it was, or an average of what it has been."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.models import Ask, Inside, WithoutAdapters, begins_as_its_base, evaluating
from kdlm.roles import EmaOf, SnapshotOf
from kdlm.section import Section
from kdlm.signal import Dense, Hidden, Rows
from kdlm.teachers.local import check_length, own_reading

Weights = Literal["current", "average", "snapshot", "start"]
ROLE = "self_teacher"
"""The name of the copy that it keeps among the networks of a run."""


class SelfTeacher:
    """Answers a batch with what a copy of the student says, without a graph and without dropout.

    What makes it a teacher is what it is told and the student is not: where a batch holds a reading of its own
    (`theirs`, see `kdlm.data.contexts`) it reads that. Told nothing, with the current weights, it is the student.

    Args:
        weights: `current`, the student's own, of this very step; `average`, an exponential moving average of them (for
            adapters: of what they add up to, not of their factors); `snapshot`, a copy that is taken again now and
            then; `start`, the student before training, which costs no memory where adapters alone are trained.
        decay: of the average: how much of it is left after each of its moves.
        every: optimiser steps between two snapshots (by default 100), or two moves of the average (1).
    """

    provides = frozenset({"teacher", "teacher.layers"})
    tells_classes = False
    signals: frozenset[type] = frozenset({Hidden, Dense})

    def __init__(self, weights: Weights = "average", *, decay: float = 0.99, every: int | None = None):
        self.weights: Weights = weights
        self.decay, self.every = decay, every or {"average": 1, "snapshot": 100}.get(weights, 0)
        self._predict: Any = None

    def roles_beside(self, student: Any) -> dict[str, EmaOf | SnapshotOf]:
        """Return the copy that it needs of a student, by its role."""
        if self.weights == "current" or (self.weights == "start" and begins_as_its_base(student)):
            return {}
        if self.weights == "average":
            return {ROLE: EmaOf("student", self.decay, self.every)}
        return {ROLE: SnapshotOf("student", partial(_due, every=self.every))}

    def follow(self, views: Mapping[str, Any]) -> None:
        """Take what it asks from the networks of a run, as methods see them."""
        if self.weights == "start" and ROLE not in views:
            self._predict = WithoutAdapters(views["student"].module)
        else:
            self._predict = views["student" if self.weights == "current" else ROLE]

    @property
    def hidden_size(self) -> int:
        return self._predict.hidden_size

    @property
    def num_layers(self) -> int:
        return self._predict.num_layers

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Hidden | Dense:
        """Return its signal at the kept rows."""
        return self.with_layers(batch, rows, ())[0]

    @torch.no_grad()
    def with_layers(
        self, batch: dict[str, Tensor], rows: Rows, layers: Sequence[int]
    ) -> tuple[Hidden | Dense, list[Tensor]]:
        """Return its signal and the outputs of decoder layers `layers` at the kept rows."""
        signal, inside = self.inside(batch, rows, Ask(layers=layers), rows)
        assert signal is not None
        return signal, inside.hidden

    @torch.no_grad()
    def inside(
        self, batch: dict[str, Tensor], rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Hidden | Dense | None, Inside]:
        """Return its signal at the rows `predicted` and what is asked of its inside at `rows`."""
        if self._predict is None:
            raise ValueError("a self teacher answers within a trainer, which shows it the student")
        if "theirs" in batch:
            check_length(batch, self._predict.module)
            theirs, rows = own_reading(batch, rows)
            predicted = None if predicted is None else own_reading(batch, predicted)[1]
            batch = theirs
        with evaluating(self._predict.module):
            return self._predict.inside(batch, rows, ask, predicted)

    @property
    def causal(self) -> bool:
        """Whether a token sees only what is before it."""
        return self._predict.causal

    def embed(self, ids: Tensor) -> Tensor:
        """Return its input embeddings of these tokens."""
        with torch.no_grad():
            return self._predict.embed(ids)


def _due(done: int, *, every: int) -> bool:
    return bool(every) and done > 0 and done % every == 0


class SelfTeacherSection(Section):
    """The student itself, told more than it is when it is asked (`data.context`), or as it was before."""

    provides: ClassVar[frozenset[str]] = SelfTeacher.provides
    """What a method may need of it."""
    signals: ClassVar[frozenset[type]] = SelfTeacher.signals
    """The signals it may answer with."""
    name: Literal["self"] = "self"
    weights: Weights = "average"
    """Whose: the student's `current` ones; their moving `average`; a `snapshot`, taken again every so many steps; or
    those of the `start`, which for a student of adapters is its base, the adapters switched off."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Of the average: what is left of it after each of its moves."""
    every: int | None = Field(None, ge=1)
    """Optimiser steps after which a snapshot is taken again (by default 100), or the average moves (1)."""

    @model_validator(mode="after")
    def _of_use(self) -> "SelfTeacherSection":
        for name, kinds in (("decay", ["average"]), ("every", ["average", "snapshot"])):
            if name in self.model_fields_set and self.weights not in kinds:
                use = " or ".join(kinds)
                raise ValueError(f"{name} does nothing with weights: {self.weights}; leave it out, or use {use}")
        return self

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        return {"current": "the student itself", "average": "an average of the student"}.get(
            self.weights, "an earlier student"
        )

    def build(self, device: torch.device) -> SelfTeacher:
        """Return the teacher, which the trainer then shows its student."""
        return SelfTeacher(self.weights, decay=self.decay, every=self.every)
