"""Group-relative policy optimisation with a teacher: what TRL's GRPOTrainer is told (see `kdlm.reward_trainer`)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.losses import Loss
from kdlm.methods.method import Batch, Method, Nets, Step, Terms
from kdlm.section import Section
from kdlm.signal import Dense, Hidden, LogProbs, Mixture

Divisor = Literal["dapo", "grpo", "bnpo", "dr_grpo"]


class GRPO(Method):
    """Policy gradient of rewards, relative to those of a prompt's other completions, and a KL to the teacher.

    Shao et al. 2024 (arXiv 2402.03300); the teacher in the reference's place: KDRL (arXiv 2506.02208, by its abstract).

    `-min(r A, clip(r, 1 - e, 1 + e) A) + b KL(q || p)` at each token that the student drew, `r = q / q_old`, A the
    reward less the group's mean, over its spread. The KL is TRL's estimate from the drawn token, k3 times r. The loss
    is TRL's own; this object only says how it is set.

    Args:
        teacher_kl: b. At 0 it is plain GRPO, without a teacher.
        clip, clip_high: e on either side; the upper one is the lower one where it is not given.
        loss_type: what sums over tokens are divided by, by TRL's names.
        scale: what advantages are divided by: the spread of rewards in the `group`, in the `batch`, or nothing.
        vocab: the ids that both tokenizers share.
    """

    paper = "arXiv 2402.03300, 2506.02208"
    signals: frozenset[type] = frozenset({Dense, Hidden, LogProbs, Mixture})
    """What the teacher may answer with: something that has the log-probability of any token."""
    ratio: float = 1.0
    """Share of the old student in what the ratio compares the student with; the teacher has the rest."""
    bound: float = 1.0
    """Largest size of the log-ratio between old student and teacher."""
    start_kl: float = 0.0
    """Weight of a KL to the student as it starts."""

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        vocab: int | Tensor | None = None,
        teacher_kl: float = 0.04,
        clip: float = 0.2,
        clip_high: float | None = None,
        loss_type: Divisor = "dapo",
        scale: Literal["group", "batch", "none"] = "group",
    ):
        if losses:
            raise ValueError(f"losses: {type(self).__name__} has its own, from the rewards: remove them")
        self.vocab, self.teacher_kl, self.clip, self.clip_high = vocab, teacher_kl, clip, clip_high
        self.loss_type, self.scale = loss_type, scale

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rollouts"} | ({"teacher"} if self.teacher_kl else set()))

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        raise ValueError(f"{type(self).__name__} runs in TRL's trainer: use kdlm.reward_trainer.TeacherGRPOTrainer")


class RLAD(GRPO):
    """GRPO whose trust region lies between the old student and the teacher (RLAD / TRRD, arXiv 2602.22495).

    `r = (q / q_old)^a (q / p)^(1 - a)` in GRPO's objective: at a = 1 it is GRPO; the smaller a, the nearer to the
    teacher are the probabilities at which the clip stops a token. The teacher moves nothing where rewards say nothing:
    a group of equal rewards has no gradient. r is not 1 at the first step, so the clip is at work from the beginning.

    Args:
        ratio: a.
        bound: largest size of `log(q_old / p)`, taken before it is exponentiated; it bounds r where a completion is
            worse than its group and the teacher finds it unlikely, which no clip does. kdlm's own choice.
        start_kl: b, of a KL to the student as it starts (k3, without the ratio).
        others: as of `GRPO`.
    """

    paper = "arXiv 2602.22495"

    def __init__(self, losses=(), *, ratio=0.5, bound=3.0, start_kl=0.0, **options: Any):
        super().__init__(losses, teacher_kl=0.0, **options)
        self.ratio, self.bound, self.start_kl = ratio, bound, start_kl

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rollouts", "teacher"})


class GRPOOptions(Section):
    """What can be asked of any method that runs in TRL's GRPOTrainer."""

    method: ClassVar[type[GRPO]]
    """The method that this Section configures."""

    clip: float = Field(0.2, gt=0, lt=1)
    """How far the ratio may fall below 1 before a token stops to count (epsilon)."""
    clip_high: float | None = Field(None, gt=0)
    """How far it may rise above 1; as far as it may fall where this is not set. DAPO: 0.28."""
    loss_type: Divisor = "dapo"
    """What the sum over tokens is divided by, by TRL's names: `dapo`, the tokens of a generation; `grpo`, those of each
    completion; `bnpo`, those of a micro-batch; `dr_grpo`, a constant."""
    scale: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the spread of rewards among a prompt's completions, in the batch, or by nothing."""

    def build(self, losses: Sequence[Loss], vocab: int | Tensor | None) -> GRPO:
        """Return the method with the ids that both tokenizers share."""
        return self.method(losses, vocab=vocab, **{key: value for key, value in self if key != "name"})


class GRPOSection(GRPOOptions):
    """Rewards relative to those of a prompt's other completions, and a KL to the teacher, in TRL's trainer."""

    method: ClassVar = GRPO
    name: Literal["grpo"] = "grpo"
    teacher_kl: float = Field(0.04, ge=0)
    """Weight of the KL to the teacher; at 0 there is none, and no teacher."""


class RLADSection(GRPOOptions):
    """GRPO with a trust region between the old student and the teacher."""

    method: ClassVar = RLAD
    name: Literal["rlad"] = "rlad"
    ratio: float = Field(0.5, ge=0, le=1)
    """Share of the old student in the trust region; the rest is the teacher's. 1 is plain GRPO."""
    bound: float = Field(3.0, gt=0)
    """Largest size of the log-ratio between old student and teacher at a token."""
    start_kl: float = Field(0.0, ge=0)
    """Weight of a KL to the student as it starts."""
