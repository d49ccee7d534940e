"""Methods that learn from the tokens which the student drew, each weighed by an advantage: policy gradients."""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import (
    IGNORE_INDEX,
    CrossEntropy,
    ReverseKL,
    count_kept,
    importance_weights,
    k3,
    kept_rows,
    measures_for,
    teacher_log_probs,
    token_log_probs,
)
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Dense, Hidden, LogProbs, Mixture, Rows, Signal, weights_of

_BOUND = 50.0
"""Largest size of a token's reward: the teacher may not know the token. Its exponential is still a float32."""


class PolicyMethod(TokenMethod):
    """Policy gradient of reverse KL on the student's own tokens: `-sum w A q(y) / sg[q(y)]`, with w and A held fixed.

    A token's reward is `log p(y) - log q(y)`, q being the student of now, not the one that wrote the text. The
    importance weight is `w = q(y) / b(y)`, b what the text was drawn from (`log_probs` of the batch); so the mean over
    tokens drawn from b is the gradient at the present student, whatever b was: older weights, another temperature, an
    engine's arithmetic. (With log q_old in the reward it would be that of KL(q || p) - KL(q || q_old).) The ratio
    enters here and nowhere else.

    Beside the loss it logs two estimates of reverse KL (k1, the reward's, and k3, of less variance), the student's
    entropy, the share of weights that were cut, and the mean size of log w before: how far the text is from the
    student, by its age, its temperature and its engine.

    Args:
        losses: cross-entropy, on text of the data beside the student's own; without it there is none in a batch.
        importance_cap: largest w; infinity cuts none, None puts w = 1 and ignores how the text was drawn.
    """

    signals: frozenset[type] = frozenset({Dense, Hidden, LogProbs, Mixture})
    """What the teacher may answer with: something that has the log-probability of any token."""
    weighs = True

    def __init__(self, losses=(), *, importance_cap: float | None = 2.0, **options):
        super().__init__(losses, **options)
        if others := [name for name, loss in self.token_losses.items() if not isinstance(loss, CrossEntropy)]:
            raise ValueError(
                f"losses: {type(self).__name__} takes cross_entropy only, on the data's own text, not "
                f"{', '.join(others)}; what compares whole distributions on rollouts is gkd"
            )
        self.importance_cap = importance_cap

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "rollouts"} | ({"labels"} if self.token_losses else set()))

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "both" if self.token_losses else "student"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count all trained tokens, those that the student drew, and those that were given."""
        weights = weights_of(batch)
        tokens = count_kept(batch["labels"], weights)
        if "sampled" not in batch:
            return {"tokens": tokens, "sampled": torch.zeros_like(tokens), "given": tokens}
        sampled = count_kept(batch["labels"].masked_fill(~batch["sampled"].bool(), IGNORE_INDEX), weights)
        return {"tokens": tokens, "sampled": sampled, "given": tokens - sampled}

    def advantages(self, rewards: Tensor, sequence: Tensor) -> Tensor:
        """Turn rewards `[rows]`, 0 where the token was given, into advantages; `sequence` numbers the sequences."""
        raise NotImplementedError

    def exact(self, student: Hidden | Dense, teacher: Signal | None, rows: Rows, sampled: Tensor) -> dict[str, Term]:
        """Return the terms that need no sample; `sampled` is 1 where the student drew the token, else 0."""
        return {}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        if "sampled" not in batch:
            raise ValueError(f"{type(self).__name__} learns from the student's own text, and the batch has none")
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher, student = nets["teacher"](batch, rows), nets["student"](batch, rows)
        call: dict[str, Any] = {"chunk_rows": self.chunk_rows, "impl": self.impl}
        log_p = teacher_log_probs(teacher, rows.labels, vocab=self.vocab, **call)
        log_q, entropy = token_log_probs(student, rows.labels, **call)
        sampled = rows.of_labels(batch["sampled"]).to(log_q)
        ratio = (log_q.detach() - log_p.to(log_q)).clamp(-_BOUND, _BOUND) * sampled
        weights, metrics = self._weights(log_q, rows, batch, sampled)
        advantages = self.advantages(-ratio, rows.of_labels(batch["sequence"]))
        once = (log_q - log_q.detach()).exp()  # 1, with the gradient of log q
        terms = {"policy": Term(-rows.sum(weights * advantages * once), "sampled")}
        terms |= self.exact(student, teacher, rows, sampled)
        for name, _, weight in self.weighted(step):
            terms[name] = Term(-rows.sum((1 - sampled) * log_q), "given", weight)
        estimates = {"reverse_kl": ratio, "reverse_kl_k3": k3(ratio)}
        metrics |= {name: weights * value for name, value in estimates.items()}
        metrics["student_entropy"] = sampled * entropy.detach()
        return Terms(terms, {name: (rows.sum(value), "sampled") for name, value in metrics.items()})

    def _weights(self, log_q: Tensor, rows: Rows, batch: Batch, sampled: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the importance weights, 0 where the token was given, and what is watched of them."""
        if self.importance_cap is None:
            return sampled, {}
        drawn_at = rows.of_labels(batch["log_probs"]).to(log_q)
        log_ratio = (log_q.detach() - drawn_at) * sampled
        cut = (log_ratio > math.log(self.importance_cap)).to(log_q)
        metrics = {"weights_cut": cut, "log_weight": log_ratio.abs()}
        return importance_weights(log_ratio, self.importance_cap) * sampled, metrics

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give reverse KL on given text, and every measure; cross-entropy with a teacher that scores tokens only."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher, student = nets["teacher"](batch, rows), nets["student"](batch, rows)
        if isinstance(teacher, LogProbs):
            judge: Any = ("cross_entropy", CrossEntropy(), 1.0)
            return self.compare(student, None, rows, step, measures_for(None), [judge])
        judge = ("reverse_kl", ReverseKL(), 1.0)
        return self.compare(student, teacher, rows, step, measures_for(type(teacher)), [judge])


class PolicyOptions(TokenOptions):
    """What can be asked of any method that learns from sampled tokens."""

    importance_cap: float | None = Field(2.0, gt=0)
    """Largest importance weight, the student's probability of a token now over the one it was drawn with; `.inf` cuts
    none, `null` leaves the weights out."""
