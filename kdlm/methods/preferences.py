"""DPO and SimPO: what TRL's trainers of preferences are told (see `kdlm.preference_trainer`)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.losses import Loss
from kdlm.methods.method import Batch, Method, Nets, Step, Terms
from kdlm.section import Section


class PreferenceMethod(Method):
    """A loss on pairs of a chosen and a rejected answer that is TRL's own; this object only says how it is set.

    Args:
        beta: how fast the loss saturates as the sides part.
        chosen_ce: weight of cross-entropy on the chosen answers, in mean over the tokens of a micro-batch.
    """

    def __init__(
        self, losses: Sequence[Loss] = (), *, vocab: int | Tensor | None = None, beta: float, chosen_ce: float = 0.0
    ):
        if losses:
            raise ValueError(f"losses: {type(self).__name__} has its own, and chosen_ce: remove them")
        self.beta, self.chosen_ce = beta, chosen_ce

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels", "preferences"})

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        raise ValueError(f"{type(self).__name__} runs in TRL's trainer: see kdlm.preference_trainer")


class DPO(PreferenceMethod):
    """Direct preference optimisation (arXiv 2305.18290), in TRL's DPOTrainer.

    `-log sigmoid(beta [log q(chosen)/ref(chosen) - log q(rejected)/ref(rejected)]) + chosen_ce CE(chosen)`, log q a sum
    over tokens. The reference is the student as it starts, or the teacher: then the student learns to prefer by more
    than the teacher does.

    Args:
        reference: `start` or `teacher`.
        others: as of `PreferenceMethod`.
    """

    paper = "arXiv 2305.18290"

    def __init__(self, losses=(), *, beta=0.1, reference: Literal["start", "teacher"] = "start", **options: Any):
        super().__init__(losses, beta=beta, **options)
        self.reference = reference

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"teacher"} if self.reference == "teacher" else set())


class SimPO(PreferenceMethod):
    """Simple preference optimisation (arXiv 2405.14734), in TRL's experimental CPOTrainer.

    `-log sigmoid(beta [log q(chosen)/|chosen| - log q(rejected)/|rejected|] - gamma) + chosen_ce CE(chosen)`: means
    over tokens, and no reference.

    Args:
        gamma: the margin that a pair is to have.
        others: as of `PreferenceMethod`.
    """

    paper = "arXiv 2405.14734"

    def __init__(self, losses=(), *, beta=2.0, gamma=1.0, **options: Any):
        super().__init__(losses, beta=beta, **options)
        self.gamma = gamma


class PreferenceOptions(Section):
    """What can be asked of any method that runs in one of TRL's trainers of preferences."""

    method: ClassVar[type[PreferenceMethod]]
    """The method that this Section configures."""

    chosen_ce: float = Field(0.0, ge=0)
    """Weight of cross-entropy on the chosen answers, which keeps their likelihood from falling (SPECS, RPO, CPO)."""

    def build(self, losses: Sequence[Loss], vocab: int | Tensor | None) -> PreferenceMethod:
        """Return the method."""
        return self.method(losses, vocab=vocab, **{key: value for key, value in self if key != "name"})


class DPOSection(PreferenceOptions):
    """Prefer the chosen answer to the rejected one by more than a reference does, in TRL's trainer."""

    method: ClassVar = DPO
    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """The smaller, the further the student may go from the reference."""
    reference: Literal["start", "teacher"] = "start"
    """What the student is compared with: itself as it starts, or the teacher, which is a model here with the student's
    tokenizer (preference distillation)."""


class SimPOSection(PreferenceOptions):
    """Prefer the chosen answer to the rejected one by a margin, in mean over their tokens, in TRL's trainer."""

    method: ClassVar = SimPO
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    """Scale of the difference of mean log-probabilities."""
    gamma: float = Field(1.0, ge=0)
    """The margin, in the scaled difference: 0.3 to 1.6 in the paper."""
