"""Self-distillation from a teacher that is told more: SDFT, OPSD and context distillation."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import IGNORE_INDEX, Loss, count_kept, importance_weights, kept_rows, token_log_probs
from kdlm.methods.gkd import GKD
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.sequences import over_sequences
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Dense, Hidden, Rows, Signal, sequence_of, weights_of


class SelfDistillation(GKD):
    """Any divergence on the student's own text to a teacher whose prompt holds what the student's does not.

    `y ~ q(.|x)`, `sum_i D( p(.|x, c, y<i), q(.|x, y<i) )`, c being the row's `context`; the teacher is `self` in the
    papers, and may be any. SDFT (arXiv 2601.19897) has a demonstration for c, an average of the student for p and
    forward KL, or TRL's JSD; OPSD (arXiv 2601.18734) a reference solution, the start for p, JSD 0.5 and a clip, since
    few tokens of style hold most of the divergence. With `student_share` 0 the text is the data's: context
    distillation (arXiv 2209.15189).

    A sequence without a context teaches nothing beyond what the teacher's weights do; `informed` logs the share of
    sequences whose teacher is told something.

    Args:
        losses: the divergences.
        student_share: share of optimiser steps on the student's own text.
        clip: largest value of a token's loss: above it the token has no gradient; infinity clips none. What is cut is
            logged as `clipped`.
        importance_cap: weigh each token by `q(y) / b(y)`, b what it was drawn from, up to this; TRL has 2. None: by 1.
    """

    paper = "arXiv 2601.19897, 2601.18734"
    unit: ClassVar[str] = "tokens"
    """What the loss is a mean over: all trained tokens, or `told` where sequences whose teacher is told nothing are
    left out."""
    weighs = True

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

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count all trained tokens, those whose teacher is told something, and the sequences."""
        told = count_kept(told_labels(batch), weights_of(batch))
        sequences = over_sequences(torch.ones_like(batch["informed"], dtype=torch.long), batch)
        return super().counts(batch) | {"told": told, "sequences": sequences}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"] if self.unit == "tokens" else told_labels(batch), weights_of(batch))
        teacher, student = nets["teacher"](batch, rows), nets["student"](batch, rows)
        return self.weighed(student, teacher, rows, batch, step)

    def weighed(
        self,
        student: Hidden | Dense,
        teacher: Signal,
        rows: Rows,
        batch: Batch,
        step: Step,
        weights: Tensor | None = None,
    ) -> Terms:
        """Return the divergences of the rows, clipped, times `weights` and their importance."""
        watched: dict[str, Tensor] = {}
        if self.importance_cap is not None and "sampled" in batch:
            with torch.no_grad():
                log_q, _ = token_log_probs(student, rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)
            drawn = self.importance(log_q, rows, batch)
            weights = drawn if weights is None else weights * drawn

        def weigh(values: Tensor) -> Tensor:
            values = self.clipped(values, watched)
            values = values if weights is None else values * weights.to(values)
            watched.update(self.watch(values.detach(), rows, batch))
            return values

        terms = self.compare(student, teacher, rows, step, weigh=weigh, unit=self.unit)
        seen = {name: (rows.sum(value), self.unit) for name, value in watched.items()}
        informed = (over_sequences(batch["informed"], batch), "sequences")
        return Terms(terms.terms, terms.metrics | seen | {"informed": informed})

    def clipped(self, values: Tensor, watched: dict[str, Tensor]) -> Tensor:
        """Return the rows' losses without what is above the clip, and add to `watched` which of them were."""
        if math.isinf(self.clip):
            return values
        watched["clipped"] = (values.detach() > self.clip).to(values)
        return values.clamp(max=self.clip)

    def watch(self, values: Tensor, rows: Rows, batch: Batch) -> dict[str, Tensor]:
        """Return what is logged of the rows, by their part in the loss."""
        return {}

    def importance(self, log_q: Tensor, rows: Rows, batch: Batch) -> Tensor:
        """Return the importance weight of each row by `log q` of its label: 1 where the text is the data's."""
        if self.importance_cap is None:
            return torch.ones_like(log_q)
        sampled = rows.of_labels(batch["sampled"]).to(log_q)
        drawn_at = rows.of_labels(batch["log_probs"]).to(log_q)
        return importance_weights((log_q - drawn_at) * sampled, self.importance_cap)


def told_labels(batch: Batch) -> Tensor:
    """Return the labels of the sequences whose teacher is told something, and IGNORE_INDEX in the others."""
    return batch["labels"].masked_fill(~batch["informed"][sequence_of(batch)], IGNORE_INDEX)


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
