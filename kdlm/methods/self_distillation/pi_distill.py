"""pi-Distill: a model that is told more and the same model that is not, trained together on what the former writes."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import ForwardKL, Loss, ReverseKL, kept_rows, token_log_probs
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.rewards import RewardMethod, RewardOptions
from kdlm.methods.sequences import over_sequences
from kdlm.signal import Dense, Hidden, Rows, weights_of
from kdlm.teachers.local import own_reading


class PiDistill(RewardMethod):
    """Privileged information distillation (arXiv 2602.04942): `J = a J_T + (1 - a) J_S`, one set of weights.

    pi_T is the student with the row's `context` in its prompt, pi_S without, and `y ~ pi_T` (`rollouts.informed`).

        J_T = E[R(y)] - b KL(pi_T || sg[pi_S])                        through the prompt with the context
        J_S = E[pi_S(y) / sg[pi_T(y)] R(y)] - b KL(sg[pi_T] || pi_S)  through the prompt without

    R is the advantage in the group. The ratio is taken token by token, over what the engine drew with, and cut at
    `importance_cap`. Both KL are over the vocabulary at each drawn token, and like R summed over the completion. The
    terms `teacher` and `student` are logged apart, and of each its policy gradient's weights and its KL.

    Where no row has a context both readings are one, and J is the plain policy gradient. The paper's OPSD, rewards on
    the student's own text with a reverse KL to the model that is told more, is `policy_gradient` with that loss.

    Formulas from the authors' page; no code is released, so their treatment of the ratio and the normaliser are not
    known here. Our tests hold each term against a computation by hand, and what is held fixed.

    Args:
        losses: none.
        share: a.
        kl: b.
        options: as of `RewardMethod`.
    """

    paper = "arXiv 2602.04942"
    weighs = True

    def __init__(self, losses: Sequence[Loss] = (), *, share: float = 0.5, kl: float = 0.1, **options: Any):
        if losses:
            raise ValueError("losses: pi_distill holds its two readings together by method.kl, and takes none")
        super().__init__(losses, **options)
        self.share, self.kl = share, kl

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"context", "informed"}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        theirs, their_rows = own_reading(batch, rows) if "theirs" in batch else (batch, rows)
        with torch.set_grad_enabled(self.share > 0):
            told = nets["student"](theirs, their_rows)
        with torch.set_grad_enabled(self.share < 1):
            alone = nets["student"](batch, rows)
        teacher, of_teacher = self._objective("teacher", told, alone, ReverseKL(), rows, batch, step)
        student, of_student = self._objective("student", alone, told, ForwardKL(), rows, batch, step)
        parts = {"teacher": Term(teacher, "sampled", self.share), "student": Term(student, "sampled", 1 - self.share)}
        informed = {"informed": (over_sequences(batch["informed"], batch), "completions")}
        return Terms(parts, of_teacher | of_student | informed)

    def _objective(
        self, name: str, own: Any, other: Any, loss: Loss, rows: Rows, batch: Batch, step: Step
    ) -> tuple[Tensor, dict[str, tuple[Tensor, str]]]:
        """Return the policy gradient of one reading and its KL to the other, held fixed, and what is watched."""
        log_q, entropy = token_log_probs(own, rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)
        policy, metrics = self.policy_gradient(log_q, rows, batch, self.advantages_of(rows, batch))
        metrics["entropy"] = (rows.sum(entropy.detach()), "sampled")
        held = self.compare(own, _fixed(other), rows, step, weighted=[("kl", loss, self.kl)], unit="sampled")
        seen = {f"{name}_{key}": value for key, value in (metrics | held.metrics).items()}
        return policy + held.terms["token_loss"].sum, seen


def _fixed(signal: Hidden | Dense) -> Hidden | Dense:
    """Return what a model says, out of reach of gradients."""
    if isinstance(signal, Hidden):
        return Hidden(signal.hidden.detach(), signal.head.detach())
    return Dense(signal.logits.detach())


class PiDistillSection(RewardOptions):
    """Learn from rewards told more and not told at once, on text of the former (`rollouts.informed: true`)."""

    method: ClassVar = PiDistill
    name: Literal["pi_distill"] = "pi_distill"
    share: float = Field(0.5, ge=0, le=1)
    """Weight of the reading with the context; the one without has the rest. The paper's 0.5 was most robust."""
    kl: float = Field(0.1, ge=0)
    """Factor on the KL that holds each reading to the other; the paper tunes it."""
