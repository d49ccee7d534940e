"""Methods that learn from the rewards of the student's own completions: group advantages and their policy gradient."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.losses import (
    IGNORE_INDEX,
    CrossEntropy,
    Loss,
    count_kept,
    importance_weights,
    kept_rows,
    measures_for,
    token_log_probs,
)
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import over_sequences
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Rows, weights_of


def group_advantages(
    rewards: Float[Tensor, "sequences"],
    group: Int[Tensor, "sequences"],
    *,
    leave_one_out: bool = False,
    scaled: bool = False,
) -> Float[Tensor, "sequences"]:
    """Return how much better each completion is than those of the same prompt.

    Args:
        rewards: one number each; NaN is no reward, which gets advantage 0 and is in no mean.
        group: which prompt each follows (`batch["index"]`).
        leave_one_out: compare with the mean of the others (RLOO) in place of the mean of all. A group of one has
            advantage 0 in either way.
        scaled: divide by the group's standard deviation (n - 1), as GRPO does; no spread, no advantage, and less than
            1e-5 of the rewards' size is no spread but rounding.
    """
    known = ~rewards.isnan()
    _, place = group.unique(return_inverse=True)
    sums = rewards.new_zeros(int(place.max()) + 1 if len(place) else 0)
    count = sums.index_add(0, place, known.to(rewards))[place]
    gap = (rewards - group_means(rewards, group)).masked_fill(~known, 0.0)
    advantages = gap * count / (count - 1).clamp(min=1) if leave_one_out else gap
    if scaled:
        spread = (sums.index_add(0, place, gap.square())[place] / (count - 1).clamp(min=1)).sqrt()
        size = sums.index_add(0, place, rewards.nan_to_num(0.0).square())[place] / count.clamp(min=1)
        advantages = torch.where(spread > 1e-5 * size.sqrt(), advantages / spread, torch.zeros_like(advantages))
    return advantages


def group_means(rewards: Float[Tensor, "sequences"], group: Int[Tensor, "sequences"]) -> Float[Tensor, "sequences"]:
    """Return for each completion the mean reward of its group, 0 where nothing in it has any."""
    known = ~rewards.isnan()
    _, place = group.unique(return_inverse=True)
    sums = rewards.new_zeros(int(place.max()) + 1 if len(place) else 0)
    count = sums.index_add(0, place, known.to(rewards))
    return (sums.index_add(0, place, rewards.nan_to_num(0.0)) / count.clamp(min=1))[place]


def groups_of(batch: Batch) -> Int[Tensor, "sequences"]:
    """Return which prompt each sequence follows. Raises ValueError where rows do not say so."""
    if "index" not in batch:
        raise ValueError("completions of a prompt are compared by `index`, and the rows have none: number the rows")
    return batch["index"]


class RewardMethod(TokenMethod):
    """Policy gradient of a reward on the student's own completions: `-sum w A log q(y)`, with w and A held fixed.

    `A` is the completion's advantage in its group, `w = q(y) / b(y)` the importance weight of a token that was drawn
    from b (`log_probs` of the batch), cut at `importance_cap` (see `PolicyMethod`). With one update for each rollout,
    w = 1 and this is the gradient of GRPO's clipped objective; for more updates use `grpo`, which is TRL's.

    With losses to a teacher on the same text, `-A log q(y) + sum_i D(p, q)`, each a mean over the tokens drawn. A
    reverse KL to a self teacher that is told more (`data.context`) is what arXiv 2602.04942 calls OPSD: no code is
    released, the formula is from the authors' page, and our tests hold that the two are added.

    The weight of a row is that of its prompt, and all completions of a prompt have it: a prompt of weight 2 counts as
    two prompts, each with such a group of completions. Advantages within the group do not change by it.

    Args:
        losses: token losses beside the policy gradient.
        importance_cap: largest w; None puts w = 1.
        leave_one_out, scaled: of `group_advantages`.
    """

    weighs = True

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        importance_cap: float | None = 2.0,
        leave_one_out: bool = False,
        scaled: bool = False,
        **options: Any,
    ):
        super().__init__(losses, **options)
        self.importance_cap = importance_cap
        self.leave_one_out, self.scaled = leave_one_out, scaled

    @property
    def needs(self) -> frozenset[str]:
        teacher = {"teacher" for loss in self.token_losses.values() if loss.needs_teacher}
        return frozenset({"rollouts", "reward"} | teacher)

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "student"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count all trained tokens, those that the student drew, and its completions."""
        weights = weights_of(batch)
        tokens = count_kept(batch["labels"], weights)
        if "sampled" not in batch:
            return {"tokens": tokens, "sampled": torch.zeros_like(tokens), "completions": torch.zeros_like(tokens)}
        sampled = count_kept(batch["labels"].masked_fill(~batch["sampled"].bool(), IGNORE_INDEX), weights)
        completions = over_sequences(torch.ones_like(batch["reward"], dtype=torch.long), batch)
        return {"tokens": tokens, "sampled": sampled, "completions": completions}

    def advantages(self, batch: Batch) -> Float[Tensor, "sequences"]:
        """Return the advantage of each completion of a batch."""
        return group_advantages(batch["reward"], groups_of(batch), leave_one_out=self.leave_one_out, scaled=self.scaled)

    def advantages_of(self, rows: Rows, batch: Batch) -> Float[Tensor, "rows"]:
        """Return the advantage of each label of `rows`: that of its completion."""
        return self.advantages(batch)[rows.of_labels(batch["sequence"])]

    def policy_gradient(
        self, log_q: Float[Tensor, "rows"], rows: Rows, batch: Batch, advantages: Float[Tensor, "rows"]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, str]]]:
        """Return -sum w A log q over the tokens that the student drew, and what is watched of the weights.

        Args:
            log_q: log-probabilities of the labels of `rows`, in the student's graph.
            advantages: of these labels; what the student did not draw counts nothing.
        """
        sampled = rows.of_labels(batch["sampled"]).to(log_q)
        weights, metrics = sampled, {}
        if self.importance_cap is not None:
            log_ratio = (log_q.detach() - rows.of_labels(batch["log_probs"]).to(log_q)) * sampled
            weights = importance_weights(log_ratio, self.importance_cap) * sampled
            metrics["weights_cut"] = (rows.sum((log_ratio > math.log(self.importance_cap)).to(log_q)), "sampled")
            metrics["log_weight"] = (rows.sum(log_ratio.abs()), "sampled")
        once = (log_q - log_q.detach()).exp()  # 1, with the gradient of log q
        return -rows.sum(weights * advantages.to(log_q) * once), metrics

    def rows(self, batch: Batch) -> Rows:
        """Return the positions that are read: those whose next token is trained on."""
        return kept_rows(batch["labels"], weights_of(batch))

    def rewarded(self, log_q: Float[Tensor, "rows"], entropy: Float[Tensor, "rows"], rows: Rows, batch: Batch) -> Terms:
        """Return the term `policy`, and what is watched of it."""
        policy, metrics = self.policy_gradient(log_q, rows, batch, self.advantages_of(rows, batch))
        sampled = rows.of_labels(batch["sampled"]).to(log_q)
        metrics["student_entropy"] = (rows.sum(sampled * entropy.detach()), "sampled")
        return Terms({"policy": Term(policy, "sampled")}, metrics)

    def compared(self, rows: Rows, batch: Batch) -> Bool[Tensor, "rows"]:
        """Return at which of the rows the student is compared with the teacher: where it drew the token."""
        return rows.of_labels(batch["sampled"])

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = self.rows(batch)
        student = nets["student"](batch, rows)
        log_q, entropy = token_log_probs(student, rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)
        found = self.rewarded(log_q, entropy, rows, batch)
        if not self.token_losses:
            return found
        weights = self.compared(rows, batch).to(log_q)
        teacher = self.ask_teacher(nets, batch, rows)
        beside = self.compare(student, teacher, rows, step, row_weights=weights, unit="sampled")
        return Terms(found.terms | beside.terms, found.metrics | beside.metrics)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give cross-entropy on given text, and every measure that can be taken with the teacher if there is one."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher = nets["teacher"](batch, rows) if "teacher" in nets else None
        measures = measures_for(None if teacher is None else type(teacher))
        judge: Any = ("cross_entropy", CrossEntropy(), 1.0)
        return self.compare(nets["student"](batch, rows), teacher, rows, step, measures, [judge])


class RewardOptions(TokenOptions):
    """What can be asked of any method that learns from rewards in groups."""

    importance_cap: float | None = Field(2.0, gt=0)
    """Largest importance weight, the student's probability of a token now over the one it was drawn with; `null` weighs
    all alike."""
    leave_one_out: bool = False
    """Compare a completion with the mean reward of the others of its prompt, in place of that of all."""
    scaled: bool = False
    """Divide advantages by the standard deviation of the rewards of the prompt, as GRPO does."""


class RewardSection(RewardOptions):
    """Policy gradient of rewards in groups, with the recipe's `losses` to a teacher beside it."""

    method: ClassVar = RewardMethod
    name: Literal["policy_gradient"] = "policy_gradient"
