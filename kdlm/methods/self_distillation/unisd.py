"""UniSD: self-distillation whose components are switched one by one."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.losses import ForwardKL, Loss, kept_rows, teacher_log_probs, token_log_probs
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.self_distillation.agreement import (
    TARGET,
    Agreement,
    Quantile,
    agreement_weights,
    disagreement,
)
from kdlm.methods.self_distillation.privileged import SelfDistillation
from kdlm.methods.tokens import TokenOptions
from kdlm.section import Section
from kdlm.signal import Hidden, Rows, sequence_of, weights_of


class Contrast(Section):
    """Keep nearer to what the teacher says in a good context than in a bad one: UniSD's third component."""

    weight: float = Field(0.1, gt=0)
    """Factor of the term."""
    margin: float = Field(0.5, ge=0)
    """Nats by which the student's log-probability of a token is to be nearer."""


class UniSD(SelfDistillation):
    """Unified self-distillation (arXiv 2605.06597): SDFT, and five components, each off unless asked for.

    1. `agreement`: each token's divergence is weighed by how alike the teacher finds it under the row's `contexts`.
    2. An average as the teacher that moves every ten steps is the teacher's: `{name: self, decay: 0.9, every: 10}`.
    3. `contrast`: `relu(m + |log q - log p_good| - |log q - log p_bad|)` of the text's tokens, good being `context`
       and bad `bad_context`; rows without the latter are left out of the sum.
    4. `features`: mean squared difference of last hidden states to the teacher's.
    5. `clip`, or `clip_quantile`, a quantile of the divergences.

    With all of them off it is `self_distillation`. Two differences from the released code, on purpose: sums are divided
    by the number of tokens, where it divides by the sum of the weights in each sequence, so that one weight for a whole
    sequence cancels there; and quantiles are followed over the run (`Quantile`), where it takes those of each
    micro-batch. In the first step, in which they are not known, nothing is weighed down and nothing clipped.

    Args:
        losses: forward KL by default.
        agreement, contrast: None is off.
        features: factor of the term; 0 is off.
        clip_quantile: share of tokens whose divergence is not clipped, in place of `clip`.
    """

    paper = "arXiv 2605.06597"
    weighs = True

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        agreement: Agreement | None = None,
        contrast: Contrast | None = None,
        features: float = 0.0,
        clip_quantile: float | None = None,
        **options: Any,
    ):
        super().__init__(losses or [ForwardKL()], **options)
        self.agreement, self.contrast, self.features = agreement, contrast, features
        self.scale = Quantile(TARGET)
        self.limit = None if clip_quantile is None else Quantile(clip_quantile)
        of_tokens = ("disagreement", "disagreeing") if agreement is not None and agreement.per == "token" else ()
        self.follows = of_tokens + (() if self.limit is None else ("divergence", "clipped"))

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher, student = nets["teacher"](batch, rows), nets["student"](batch, rows)
        weights, watched = self._agreed(nets["teacher"], batch, rows)
        found = self.weighed(student, teacher, rows, batch, step, weights)
        terms = dict(found.terms)
        if self.contrast is not None:
            terms["contrast"] = Term(
                self._contrast(nets, student, teacher, batch, rows), "tokens", self.contrast.weight
            )
        if self.features:
            if not isinstance(student, Hidden) or not isinstance(teacher, Hidden):
                raise ValueError("method.features: it wants last hidden states, and one of the two gives logits alone")
            apart = (student.hidden - teacher.hidden.detach()).float().square().mean(-1)
            terms["features"] = Term(rows.sum(apart), "tokens", self.features)
        return Terms(terms, found.metrics | {name: (rows.sum(value), "tokens") for name, value in watched.items()})

    def _said(self, teacher: Any, batch: Batch, rows: Rows) -> Tensor:
        """Return the teacher's log-probabilities of the text."""
        call: dict[str, Any] = {"vocab": self.vocab, "chunk_rows": self.chunk_rows, "impl": self.impl}
        return teacher_log_probs(teacher(batch, rows), rows.labels, **call)

    def _agreed(self, teacher: Any, batch: Batch, rows: Rows) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self.agreement is None:
            return None, {}
        said: Any = [self._said(teacher, {**batch, "theirs": one}, rows) for one in batch.get("others", ())]
        stacked = torch.stack(said) if said else torch.zeros(0, len(rows))
        apart = disagreement(stacked, self.agreement, rows.of_labels(sequence_of(batch)))
        weights = agreement_weights(apart, self.agreement, self.scale)
        above = (apart > self.scale.value.to(apart)).to(apart)
        return weights, {"disagreement": apart, "disagreeing": above, "agreement": weights}

    def _contrast(self, nets: Nets, student: Any, good: Any, batch: Batch, rows: Rows) -> Tensor:
        assert self.contrast is not None
        call: dict[str, Any] = {"chunk_rows": self.chunk_rows, "impl": self.impl}
        log_q, _ = token_log_probs(student, rows.labels, **call)
        log_p = teacher_log_probs(good, rows.labels, vocab=self.vocab, **call)
        # Asked where no row has a bad context too: a sharded teacher is asked by all ranks or by none.
        other = {**batch, "theirs": batch["misled"]} if "misled" in batch else batch
        log_bad = self._said(nets["teacher"], other, rows)
        apart = (log_q - log_p.to(log_q)).abs() - (log_q - log_bad.to(log_q)).abs()
        told = batch.get("misguided", torch.zeros_like(batch["informed"]))[rows.of_labels(sequence_of(batch))]
        return rows.sum(torch.relu(self.contrast.margin + apart).masked_fill(~told, 0.0))

    def clipped(self, values: Tensor, watched: dict[str, Tensor]) -> Tensor:
        if self.limit is None:
            return super().clipped(values, watched)
        most = self.limit.value.to(values)
        watched["divergence"], watched["clipped"] = values.detach(), (values.detach() > most).to(values)
        return values.clamp(max=most) if self.limit.known else values

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        if "disagreement" in means:
            self.scale.follow(means["disagreement"], means["disagreeing"])
        if self.limit is not None:
            self.limit.follow(means["divergence"], means["clipped"])

    def state_dict(self) -> dict[str, Tensor]:
        limit = {} if self.limit is None else {"limit": self.limit.value}
        return {"scale": self.scale.value, **limit}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale.value = state["scale"].double()
        if self.limit is not None:
            self.limit.value = state["limit"].double()


class UniSDSection(TokenOptions):
    """Self-distillation with components that are switched one by one."""

    method: ClassVar = UniSD
    name: Literal["unisd"] = "unisd"
    student_share: float = Field(1.0, ge=0, le=1)
    """Share of optimiser steps that train on the student's own text; the others take the data's answers."""
    agreement: Agreement | None = None
    """Weigh by how alike the teacher is under the row's `contexts`; `null` weighs all alike."""
    contrast: Contrast | None = None
    """Keep away from what the teacher says after the row's `bad_context`; `null` does not."""
    features: float = Field(0.0, ge=0)
    """Factor of the mean squared difference of last hidden states; the released code: 0.1 or 0.01."""
    clip: float = Field(math.inf, gt=0)
    """Largest value of a token's divergence, in nats; above it the token is not learned from."""
    clip_quantile: float | None = Field(None, gt=0, lt=1)
    """In place of `clip`: the share of tokens whose divergence is not clipped."""
    importance_cap: float | None = Field(None, gt=0)
    """Weigh tokens by the student's probability now over that they were drawn with, up to this; `null`: all alike."""

    @model_validator(mode="after")
    def _one_clip(self) -> "UniSDSection":
        if self.clip_quantile is not None and math.isfinite(self.clip):
            raise ValueError("clip and clip_quantile both clip: keep one")
        return self
