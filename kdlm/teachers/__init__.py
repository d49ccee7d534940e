"""Teachers: batch -> Signal."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.section import Custom, Section
from kdlm.signal import Dense, Hidden, Mixture, Rows, Signal
from kdlm.teachers.ahead import AheadTeacher
from kdlm.teachers.cached import CachedTeacher, CachedTeacherSection
from kdlm.teachers.ensemble import Ensemble
from kdlm.teachers.frozen import (
    DenoiserTeacherSection,
    DualEncoderTeacherSection,
    FrozenNetwork,
    ImageClassifierTeacherSection,
    ImageEnsembleSection,
    MaskedAutoencoderTeacherSection,
    TextClassifierTeacherSection,
    freeze,
)
from kdlm.teachers.local import (
    LocalTeacher,
    LocalTeacherSection,
    MaskedTeacherSection,
    SandboxTeacherSection,
    VisionLanguageTeacherSection,
)
from kdlm.teachers.openai import OpenAITeacher, OpenAITeacherSection
from kdlm.teachers.self_teacher import SelfTeacher, SelfTeacherSection
from kdlm.teachers.served import ServedTeacher, ServedTeacherSection
from kdlm.teachers.vllm import VLLMTeacher, VLLMTeacherSection
from kdlm.teachers.weights import ByDomain, Confidence, Learned, Weights, check_weights
from kdlm.teachers.wire import vocabulary_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Teacher(Protocol):
    """Whatever answers a batch with a signal at its kept rows.

    A teacher may have more, and is asked for it where it does:

    `vocab_size`: how many ids it scores, where that is known.
    `prefetch(batch) -> Any`: called where the batch is made (a worker process, or the main one a batch ahead); what it
        returns is found under `batch["teacher"]` when the teacher is called.
    `require(rows)`: raises ValueError where the training or evaluation rows hold what it cannot answer.
    `close()`: called when the run is over.
    `needs_fit`, `fit(batches, vocab)`, `readings()`, `state_dict()`, `load_state_dict(state)`: something is learned
        from evaluation rows before the first step; `batches` yields each with its kept rows. What it learned is
        logged, and checkpoints keep the state.
    `answer_ahead(asked)`: called before each optimiser step with its micro-batches and their rows, all of them at once;
        `at_hand()`: a context in which it is asked again and again.
    `fingerprint()`: tells its weights from others, for `kdlm capture`.
    `roles_beside(student)`, `follow(views)`: a copy of the student that the run keeps for it, moves and saves as those
        of a method; and the networks of the run, once they are there.
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


SingleTeacher = (
    LocalTeacherSection
    | SandboxTeacherSection
    | CachedTeacherSection
    | ServedTeacherSection
    | OpenAITeacherSection
    | VLLMTeacherSection
    | VisionLanguageTeacherSection
    | CustomTeacher
)
"""A teacher that can be a member of an ensemble."""


class EnsembleSection(Section):
    """Several teachers averaged: by fixed weights, by domain, by confidence, or by weights learned on held-out rows."""

    provides: ClassVar[frozenset[str]] = Ensemble.provides
    """What a method may need of it, known without loading the weights."""
    name: Literal["ensemble"] = "ensemble"
    members: list[Annotated[SingleTeacher, Field(discriminator="name")]] = Field(min_length=1)
    """Teachers that give whole distributions, all with the student's tokenizer, or across tokenizers with one."""
    weights: Weights | None = None
    """One number per member, of which the ratios count, or a rule: `by_domain`, `confidence`, `learned`. By default all
    members weigh alike."""
    space: Literal["probability", "log"] = "probability"
    """Average probabilities, or log-probabilities: a geometric mean, which keeps what all members find likely."""
    resident: Literal["all", "one"] = "all"
    """`one` keeps members on the CPU and moves each to the device for its own forward: slower, in the memory of one."""

    @model_validator(mode="after")
    def _agree(self) -> "EnsembleSection":
        check_weights(self.weights, len(self.members))
        for number, member in enumerate(self.members):
            if not getattr(member, "signals", {Dense, Hidden}) & {Dense, Hidden}:
                raise ValueError(f"members.{number}: {member.name} gives no whole distribution to average")
            if (
                getattr(member, "placement", "resident") != "resident"
                or getattr(member, "batch_size", None) is not None
            ):
                raise ValueError(
                    f"members.{number}: a member of an ensemble has no placement and no batch_size of its own: leave "
                    "them out; resident: one keeps members in the host's memory"
                )
            here = getattr(member, "device", None) is None and getattr(member, "quantization", "none") == "none"
            if self.resident == "one" and not (
                isinstance(member, LocalTeacherSection | SandboxTeacherSection) and here
            ):
                raise ValueError(
                    f"resident: one moves local models between CPU and device, which members.{number} does not allow "
                    "(another kind of teacher, a `device` of its own, or quantised); use resident: all"
                )
        return self

    @property
    def signals(self) -> frozenset[type]:
        """The signals it may answer with: a geometric mean of hidden states is one head, and so `Hidden` again."""
        joins = self.space == "log" and not isinstance(self.weights, Confidence)
        return frozenset({Mixture, Hidden} if joins else {Mixture})

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        names = [member.describe() if hasattr(member, "describe") else member.name for member in self.members]
        return f"ensemble of {', '.join(names)}"

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Open the tokenizer that all members have. Raises ValueError where they have several."""
        sections: list[Any] = list(self.members)
        if nameless := [i for i, member in enumerate(sections) if not hasattr(member, "tokenizer")]:
            raise ValueError(f"teacher.members.{nameless[0]}: does not say which tokenizer it reads with")
        first, *others = (member.tokenizer() for member in sections)
        for number, other in enumerate(others, 1):
            if vocabulary_digest(other) != vocabulary_digest(first):
                raise ValueError(
                    f"teacher.members.{number}: has another tokenizer than teacher.members.0; across tokenizers, the "
                    "members of an ensemble must share one"
                )
        return first

    def build(self, device: torch.device) -> Ensemble:
        """Load every member; `device` is where the student trains."""
        home = torch.device("cpu") if self.resident == "one" else device
        members = [member.build(home) for member in self.members]
        return Ensemble(members, self.weights, space=self.space, resident=self.resident)


def teachers_of(section: Any) -> list[tuple[str, Any]]:
    """Return every teacher of a recipe with its key: an ensemble's members in its place, none where there is none."""
    if isinstance(section, EnsembleSection | ImageEnsembleSection):
        return [(f"teacher.members.{number}", member) for number, member in enumerate(section.members)]
    return [] if section is None else [("teacher", section)]


AnyTeacher = Annotated[
    SingleTeacher
    | SelfTeacherSection
    | EnsembleSection
    | ImageClassifierTeacherSection
    | ImageEnsembleSection
    | DualEncoderTeacherSection
    | MaskedAutoencoderTeacherSection
    | MaskedTeacherSection
    | TextClassifierTeacherSection
    | DenoiserTeacherSection,
    Field(discriminator="name"),
]
__all__ = [
    "AheadTeacher",
    "AnyTeacher",
    "ByDomain",
    "CachedTeacher",
    "CachedTeacherSection",
    "Confidence",
    "CustomTeacher",
    "DenoiserTeacherSection",
    "DualEncoderTeacherSection",
    "Ensemble",
    "EnsembleSection",
    "FrozenNetwork",
    "ImageClassifierTeacherSection",
    "ImageEnsembleSection",
    "Learned",
    "LocalTeacher",
    "LocalTeacherSection",
    "MaskedAutoencoderTeacherSection",
    "MaskedTeacherSection",
    "OpenAITeacher",
    "OpenAITeacherSection",
    "SandboxTeacherSection",
    "SelfTeacher",
    "SelfTeacherSection",
    "ServedTeacher",
    "ServedTeacherSection",
    "Teacher",
    "VLLMTeacher",
    "VLLMTeacherSection",
    "VisionLanguageTeacherSection",
    "freeze",
    "teachers_of",
]
