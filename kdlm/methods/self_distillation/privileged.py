"""Self-distillation from a teacher that is told more: SDFT, OPSD and context distillation."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import Loss, importance_weights, kept_rows, token_log_probs
from kdlm.methods.gkd import GKD
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.sequences import rows_of
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Dense, Hidden, Rows, Signal


class SelfDistillation(GKD):
    """Any divergence on the student's own text to a teacher whose prompt holds what the student's does not.

    `y ~ q(.|x)`, `sum_i D( p(.|x, c, y<i), q(.|x, y<i) )`, c being the row's `context`; the teacher is `self` in the
    papers, and may be any. SDFT (arXiv 2601.19897) has a demonstration for c, an average of the student for p and
    forward KL, or TRL's JSD; OPSD (arXiv 2601.18734) a reference solution, the start for p, JSD 0.5 and a clip, since
    few tokens of style hold most of the divergence. With `student_share` 0 the text is the data's: context
    distillation (arXiv 2209.15189).

    A sequence without a context teaches nothing beyond what the teacher's weights do; `informed` logs the share of
    tokens whose teacher is told something.

    Args:
        losses: the divergences.
        student_share: share of optimiser steps on the student's own text.
        clip: largest value of a token's loss: above it the token has no gradient; infinity clips none. What is cut is
            logged as `clipped`.
        importance_cap: weigh each token by `q(y) / b(y)`, b what it was drawn from, up to this; TRL has 2. None: by 1.
    """

    paper = "arXiv 2601.19897, 2601.18734"

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        student_share: float = 1.0,
        clip: float = math.inf,
        importance_cap: float | None = None,
        **options: Any,
    ):
        super().__init__(losses, student_share=student_share, **options)
        self.clip, self.importance_cap = clip, importance_cap

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"context"}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"])
        teacher, student = nets["teacher"](batch, rows), nets["student"](batch, rows)
        watched = {"informed": rows_of(batch["informed"], batch, rows).float()}
        weights = None
        if self.importance_cap is not None and "sampled" in batch:
            weights = self._drawn(student, rows, batch, self.importance_cap)
        terms = self.weighed(student, teacher, rows, step, watched, weights)
        metrics = terms.metrics | {name: (value.sum(), "tokens") for name, value in watched.items()}
        return Terms(terms.terms, metrics)

    def weighed(
        self,
        student: Hidden | Dense,
        teacher: Signal | None,
        rows: Rows,
        step: Step,
        watched: dict[str, Tensor],
        weights: Tensor | None = None,
    ) -> Terms:
        """Return the divergences of the rows, clipped, times their weights; adds to `watched` what was clipped."""

        def weigh(values: Tensor) -> Tensor:
            if math.isfinite(self.clip):
                watched["clipped"] = (values.detach() > self.clip).float()
                values = values.clamp(max=self.clip)
            return values if weights is None else values * weights.to(values)

        return self.compare(student, teacher, rows, step, weigh=weigh)

    def _drawn(self, student: Hidden | Dense, rows: Rows, batch: Batch, cap: float) -> Tensor:
        """Return the importance weight of each token, 1 where the text is the data's."""
        with torch.no_grad():
            log_q, _ = token_log_probs(student, rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)
        sampled = rows.of_labels(batch["sampled"]).to(log_q)
        return importance_weights((log_q - rows.of_labels(batch["log_probs"]).to(log_q)) * sampled, cap)


class SelfDistillationSection(TokenOptions):
    """The recipe's `losses` on the student's own text, to a teacher that is told more (`data.context`)."""

    method: ClassVar = SelfDistillation
    name: Literal["self_distillation"] = "self_distillation"
    student_share: float = Field(1.0, ge=0, le=1)
    """Share of optimiser steps that train on the student's own text; the others take the data's answers."""
    clip: float = Field(math.inf, gt=0)
    """Largest value of a token's loss, in nats; above it the token is not learned from. OPSD clips, since few tokens of
    style hold most of the divergence."""
    importance_cap: float | None = Field(None, gt=0)
    """Weigh tokens by the student's probability now over the one they were drawn with, up to this; TRL: 2. `null`
    weighs all alike."""

    def build(self, losses, vocab) -> TokenMethod:
        if not losses:
            raise ValueError(f"losses: {self.name} needs at least one, e.g. [{{name: forward_kl}}]")
        return super().build(losses, vocab)
