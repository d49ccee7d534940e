"""SDPO: the teacher of an attempt is told a successful attempt of the same group, or what the verifier said of it."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from kdlm.losses import Loss, ReverseKL, teacher_log_probs, token_log_probs, told_of_likeliest
from kdlm.methods.method import Batch, Step, Term, Terms, Told
from kdlm.methods.self_distillation.privileged import SelfDistillation
from kdlm.methods.sequences import over_sequences
from kdlm.methods.tokens import TokenOptions
from kdlm.rollouts import Written
from kdlm.signal import Dense, Hidden, Rows, Signal, summed

PEER = "\nCorrect solution:\n\n{peer}\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"
_BOUND = 50.0
"""Largest size of a sampled token's log-ratio: its exponential is still a float32."""

Feedback = Literal["never", "without_peer", "always"]


class SDPO(SelfDistillation):
    """Self-distillation policy optimisation (arXiv 2601.20802): rewards choose what the teacher is told, no more.

    Of each group of attempts at a prompt, the teacher of one is told the first *other* attempt that succeeded, and what
    the verifier said of this one. Attempts of which neither is there are left out of the loss and of what it is a mean
    over (`told` tokens, counted before any forward pass); how many they are is logged as `untold`, and groups of
    nothing else as `untold_groups`.

    Three forms: with `losses`, these divergences over the vocabulary, or with `top_k` over the tokens that the student
    finds most probable and one bucket for all others; without, reverse KL by the tokens that were drawn,
    `sg[log q(y) - log p(y)] log q(y)`. Each is weighed by `q(y) / b(y)`, b what the text was drawn from, up to
    `importance_cap`.

    The mean is over tokens; the authors' code and TRL take it over each attempt first, and then over all attempts,
    those that are left out among them.

    Args:
        losses: divergences; none means drawn tokens.
        top_k: size of the support.
        success: reward from which on an attempt is told to others.
        peers: whether successful attempts are told at all.
        feedback: when the verifier's words are: `without_peer` where there is no successful other.
        peer_template, feedback_template: how the two are written, one after the other, into `data.context`.
    """

    paper = "arXiv 2601.20802"
    unit = "told"

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        top_k: int | None = None,
        success: float = 1.0,
        peers: bool = True,
        feedback: Feedback = "always",
        peer_template: str = PEER,
        feedback_template: str = FEEDBACK,
        importance_cap: float | None = 2.0,
        **options: Any,
    ):
        self.drawn = not losses
        if self.drawn and top_k is not None:
            raise ValueError("method.top_k: drawn tokens are compared without losses; add e.g. [{name: jsd}], or none")
        super().__init__(losses or [ReverseKL()], importance_cap=importance_cap, **options)
        self.top_k, self.success, self.peers, self.feedback = top_k, success, peers, feedback
        self.peer_template, self.feedback_template = peer_template, feedback_template

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"reward"}

    def told(self, written: Sequence[Written]) -> Sequence[Told]:
        successes: dict[int, list[Written]] = {}
        for one in written:
            if self.peers and one.reward is not None and one.reward >= self.success:
                successes.setdefault(one.completion.group, []).append(one)
        return [self._context(one, successes.get(one.completion.group, [])) for one in written]

    def _context(self, one: Written, successes: Sequence[Written]) -> str:
        peer = next((other.text for other in successes if other is not one), None)
        said = getattr(one, "feedback", None)
        if self.feedback == "never" or (self.feedback == "without_peer" and peer is not None):
            said = None
        told = "" if peer is None else self.peer_template.replace("{peer}", peer)
        return told + (self.feedback_template.replace("{feedback}", said) if said and said.strip() else "")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return super().counts(batch) | {"groups": _count_groups(batch, torch.ones_like(batch["informed"]))}

    def weighed(
        self, student: Hidden | Dense, teacher: Signal, rows: Rows, batch: Batch, step: Step, weights: Any = None
    ) -> Terms:
        if self.drawn:
            terms = self._by_drawn(student, teacher, rows, batch)
        else:
            if self.top_k is not None:
                call: dict[str, Any] = {"chunk_rows": self.chunk_rows, "impl": self.impl}
                teacher = told_of_likeliest(student, teacher, self.top_k, **call)
            terms = super().weighed(student, teacher, rows, batch, step, weights)
        every, told = (_count_groups(batch, of) for of in (torch.ones_like(batch["informed"]), batch["informed"]))
        return Terms(terms.terms, terms.metrics | {"untold_groups": ((every - told).float(), "groups")})

    def _by_drawn(self, student: Hidden | Dense, teacher: Signal, rows: Rows, batch: Batch) -> Terms:
        call: dict[str, Any] = {"chunk_rows": self.chunk_rows, "impl": self.impl}
        log_q, entropy = token_log_probs(student, rows.labels, **call)
        log_p = teacher_log_probs(teacher, rows.labels, vocab=self.vocab, **call)
        gap = (log_q.detach() - log_p.to(log_q)).clamp(-_BOUND, _BOUND)
        weights = self.importance(log_q.detach(), rows, batch)
        once = (log_q - log_q.detach()).exp()  # 1, with the gradient of log q
        watched = {"reverse_kl": gap * weights, "student_entropy": entropy.detach()}
        metrics = {name: (rows.sum(value), self.unit) for name, value in watched.items()}
        metrics["informed"] = (over_sequences(batch["informed"], batch), "sequences")
        return Terms({"token_loss": Term(rows.sum(gap * weights * once), self.unit)}, metrics)


def _groups(batch: Batch) -> Tensor:
    """Return a number for each sequence, equal for attempts at one prompt."""
    return batch["index"] if "index" in batch else torch.arange(len(batch["informed"]), device=batch["informed"].device)


def _count_groups(batch: Batch, of: Tensor) -> Tensor:
    """Return how many groups have an attempt in `of`, by their weights, which all attempts of a group share."""
    numbers, place = _groups(batch)[of].unique(return_inverse=True)
    weights = batch.get("weight")
    if weights is not None:
        weights = weights.new_zeros(len(numbers)).scatter(0, place, weights[of])
    return summed(torch.ones_like(numbers), weights)


class SDPOSection(TokenOptions):
    """Attempts of a group learn from the one that succeeded, and from what the verifier says."""

    method: ClassVar = SDPO
    name: Literal["sdpo"] = "sdpo"
    top_k: int | None = Field(None, ge=1)
    """Compare at so many tokens, those that the student finds most probable, and at one bucket for all others; the
    paper: 100. `null` compares over the vocabulary."""
    success: float = 1.0
    """Reward from which on an attempt is told to the teacher of others."""
    peers: bool = True
    """Tell the first other attempt of the group that succeeded."""
    feedback: Feedback = "always"
    """Tell what the verifier said of the attempt: `never`, `always`, or `without_peer`, where none succeeded."""
    peer_template: str = PEER
    """How a successful attempt is told; `{peer}` stands for it."""
    feedback_template: str = FEEDBACK
    """How the verifier's words are told; `{feedback}` stands for them."""
    clip: float = Field(float("inf"), gt=0)
    """Largest value of a token's divergence, in nats; above it the token is not learned from."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Largest importance weight, the student's probability of a token now over the one it was drawn with; `null` weighs
    all alike."""

    @field_validator("peer_template", "feedback_template")
    @classmethod
    def _whole(cls, template: str, info: Any) -> str:
        name = "{peer}" if info.field_name == "peer_template" else "{feedback}"
        if template.count(name) != 1:
            raise ValueError(f"{name} stands {template.count(name)} times in it, expected once")
        return template

    @model_validator(mode="after")
    def _tells(self) -> "SDPOSection":
        if not self.peers and self.feedback == "never":
            raise ValueError("the teacher is told nothing: set peers: true, or feedback: always")
        return self
