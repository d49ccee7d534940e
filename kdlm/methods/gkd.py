"""GKD: token-level distillation on the student's own text, on given text, or now one and now the other."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdlm.losses import Loss
from kdlm.methods.method import Step
from kdlm.methods.tokens import TokenMethod, TokenOptions


class GKD(TokenMethod):
    """Any divergence on a mix of the student's samples and given text (Agarwal et al. 2024, arXiv 2306.13649, eq. 4).

    Each optimiser step draws, alike on every rank, whose text it takes: the student's with probability `student_share`
    (the paper's lambda). No gradient goes through the sampling. With `student_share` 0 it is `logit_kd`; with 1 and
    reverse KL it is full-vocabulary on-policy distillation.

    Args:
        student_share: lambda, 0 to 1.
        others: as of `TokenMethod`.
    """

    paper = "arXiv 2306.13649"

    def __init__(self, losses: Sequence[Loss] = (), *, student_share: float = 0.5, **options: Any):
        super().__init__(losses, **options)
        self.student_share = student_share

    @property
    def needs(self) -> frozenset[str]:
        teacher = {"teacher" for loss in self.token_losses.values() if loss.needs_teacher}
        labels = {"labels"} if self.student_share < 1 else set()
        return frozenset(teacher | labels | ({"rollouts"} if self.student_share > 0 else set()))

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "student" if draw < self.student_share else "data"


class GKDSection(TokenOptions):
    """The recipe's `losses` on the student's own samples, on the data's answers, or on both by turns."""

    method: ClassVar = GKD
    name: Literal["gkd"] = "gkd"
    student_share: float = Field(0.5, ge=0, le=1)
    """Share of optimiser steps that train on the student's own text (lambda); the others take the data's."""

    def build(self, losses, vocab) -> TokenMethod:
        if not losses:
            raise ValueError("losses: gkd needs at least one, e.g. [{name: jsd, beta: 0.5}] or [{name: reverse_kl}]")
        return super().build(losses, vocab)
