"""A teacher that answers ahead, without numbers: its turn in the step, and where its weights are meanwhile."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdlm.losses import kept_rows
from kdlm.models.prediction import head
from kdlm.plan.ledger import Ledger
from kdlm.plan.settings import Settings
from kdlm.signal import Hidden
from kdlm.teachers import AheadTeacher
from kdlm.teachers.regrouping import Reading

Batch = dict[str, Tensor]


class Turns:
    """The turns of a recipe's teacher.

    Attributes:
        moved: bytes that go from the host's memory to the device in each turn.
    """

    def __init__(self, teacher: AheadTeacher, settings: Settings, ledger: Ledger):
        self.teacher, self.settings, self.ledger = teacher, settings, ledger
        self.moved = 0
        if teacher.sliced and settings.device.apart:
            stays = head(teacher.model).weight if teacher.signals == {Hidden} else None
            weights = [parameter for parameter in teacher.model.parameters() if parameter is not stays]
            self.moved = sum(weight.numel() * weight.element_size() for weight in weights)
            teacher.shelf = _Shelf(weights, ledger)  # pyright: ignore[reportAttributeAccessIssue]  as much of one
            teacher.shelf.put_back()  # pyright: ignore[reportOptionalMemberAccess]

    def learn(self, batch: Batch, ask: Callable[[], None]) -> None:
        """Let the teacher see what it is asked in a step, as it has when the second one comes; nothing is counted."""
        with self.ledger.phase("asked", "teacher activations"), torch.no_grad():
            self.teacher.answer_ahead([(batch, kept_rows(batch["labels"]))])
            ask()
        del self.ledger.phases["asked"]

    def take(self, batches: Sequence[Batch]) -> None:
        """Answer all micro-batches of a step; the answers stay."""
        with self.ledger.phase("teacher's turn", "teacher activations"):
            self.teacher.answer_ahead([(batch, kept_rows(batch["labels"])) for batch in batches])
            for answer in self.teacher.made:
                signal = answer.signal.hidden if isinstance(answer.signal, Hidden) else answer.signal.logits
                for tensor in (signal, *answer.layers.values()):
                    self.ledger.move(tensor, "cache")


def by_shape(settings: Settings) -> Callable[[Sequence[Reading], int], list[Reading]]:
    """Return what regroups readings whose numbers cannot be read: every sequence has the step's length."""

    def regrouped(readings: Sequence[Reading], size: int) -> list[Reading]:
        length, inputs = settings.length, readings[0].inputs
        total = sum(one.inputs["input_ids"].numel() for one in readings) // length
        parts = []
        for count in (min(size, total - done) for done in range(0, total, size)):
            shape = (1, count * length) if settings.flat else (count, length)
            own = {key: value.new_ones(shape) for key, value in inputs.items()}
            parts.append(Reading(own, readings[0].index.new_empty(count * length)))
        return parts

    return regrouped


class _Shelf:
    def __init__(self, weights: Sequence[Tensor], ledger: Ledger):
        self.weights, self.ledger = weights, ledger

    def fetch(self) -> None:
        for weight in self.weights:
            self.ledger.bring(weight)

    def put_back(self) -> None:
        for weight in self.weights:
            self.ledger.set_aside(weight)
