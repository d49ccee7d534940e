"""Teachers: batch -> Signal."""

from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from kdlm.section import Custom
from kdlm.signal import Rows, Signal
from kdlm.teachers.local import LocalTeacher, LocalTeacherSection, SandboxTeacherSection
from kdlm.teachers.openai import OpenAITeacher, OpenAITeacherSection
from kdlm.teachers.remote import TeacherUnavailable
from kdlm.teachers.served import ServedTeacher, ServedTeacherSection


class Teacher(Protocol):
    """Whatever answers a batch with a signal at its kept rows.

    A teacher may have more, and is asked for it where it does:

    `vocab_size`: how many ids it scores, where that is known.
    `prefetch(batch) -> Any`: called where the batch is made (a worker process, or the main one a batch ahead); what it
        returns is found under `batch["teacher"]` when the teacher is called.
    `require(rows)`: raises ValueError where the training or evaluation rows hold what it cannot answer.
    `close()`: called when the run is over.
    """

    provides: frozenset[str]
    """What methods may need of it: `teacher`, `teacher.layers`."""

    @property
    def signals(self) -> frozenset[type]:
        """The kinds of signal it answers with."""
        ...

    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Signal:
        """Return the signal at the kept rows, on their device, without a graph."""
        ...


class CustomTeacher(Custom):
    """Your own teacher: `target` is called with (device, **args) and returns a `kdlm.teachers.Teacher`."""

    name: Literal["custom"] = "custom"

    def build(self, device: torch.device) -> Any:
        return self.load()(device, **self.args)


AnyTeacher = Annotated[
    LocalTeacherSection | SandboxTeacherSection | ServedTeacherSection | OpenAITeacherSection | CustomTeacher,
    Field(discriminator="name"),
]

__all__ = [
    "AnyTeacher",
    "CustomTeacher",
    "LocalTeacher",
    "LocalTeacherSection",
    "OpenAITeacher",
    "OpenAITeacherSection",
    "SandboxTeacherSection",
    "ServedTeacher",
    "ServedTeacherSection",
    "Teacher",
    "TeacherUnavailable",
]
