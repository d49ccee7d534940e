"""RLTF-SD: the attempt after feedback is learned as an answer to the prompt alone."""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.losses import kept_rows, token_log_probs
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.rewards import group_means, groups_of
from kdlm.methods.sequences import over_sequences
from kdlm.methods.turns import TurnOptions, TurnRewards, later_turns, of_turns
from kdlm.signal import weights_of


class RLTFSD(TurnRewards):
    """RL from text feedback, by self-distillation (arXiv 2602.02482): the second attempt teaches the first.

    `y0 ~ q(.|x0)`, the verifier says f, `y1 ~ q(.|x0, y0, f)`. The term `distilled` has the gradient
    `-A grad log q(y1 | x0)`, y1 read right after the prompt, with `A = R(y1) - mean R(y0)` over the group and no
    importance weight. Beside it, `policy` is the policy gradient of both turns in the whole episode, each by its own
    advantage. Both are sums over an episode, divided by the number of tokens drawn, so that their proportion is that of
    the sums. Episodes of more turns teach with each later one; one that ended with its first has nothing to teach.

    Without a weight, what is unlikely after x0 can be made less likely without end: `negative_cap` bounds A below.

    The formulas are from third-party notes; the authors' code was not read. Our tests hold the gradient by hand-made
    batches, its sign, and that nothing but y1 has any in `distilled`.

    Args:
        losses: token losses beside them, on the whole episode.
        policy_weight: factor on `policy`; 0 leaves it out, and the episodes are not read.
        negative_cap: the largest size of a negative A: 0 learns from those better than the mean first attempt only.
        options: as of `TurnRewards`.
    """

    paper = "arXiv 2602.02482"
    weighs = True

    def __init__(self, losses=(), *, policy_weight: float = 1.0, negative_cap: float = math.inf, **options: Any):
        super().__init__(losses, **options)
        if losses and not policy_weight:
            raise ValueError("method.policy_weight: at 0 no episode is read, and `losses` have nothing to act on")
        self.policy_weight, self.negative_cap = policy_weight, negative_cap

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        terms, metrics = {}, {}
        if self.policy_weight:
            found = super().losses(nets, batch, active, step)
            policy = found.terms["policy"]
            terms = found.terms | {"policy": Term(policy.sum, policy.unit, self.policy_weight)}
            metrics = found.metrics
        distilled, better, worse = self.distilled(nets, batch)
        first = batch["turn_rewards"][:, 0].nan_to_num(0.0)
        metrics = metrics | {
            "first_reward": (over_sequences(first, batch), "completions"),
            "taught_better": (better, "sampled"),
            "taught_worse": (worse, "sampled"),
        }
        return Terms({"distilled": Term(distilled, "sampled"), **terms}, metrics)

    def distilled(self, nets: Nets, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return `-sum A log q(y_t | x0)` over the tokens of later turns, and at how many A is above and below 0."""
        reading, weights = later_turns(batch), weights_of(batch)
        rows = kept_rows(reading["labels"], None if weights is None else weights.flatten()[reading["at"]])
        student = nets["student"]({name: value for name, value in reading.items() if name != "at"}, rows)
        log_q, _ = token_log_probs(student, rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)
        rewards = batch["turn_rewards"]
        gaps = (rewards - group_means(rewards[:, 0], groups_of(batch))[:, None]).nan_to_num(0.0)
        advantages = of_turns(gaps.clamp(min=-self.negative_cap), batch, rows.of_labels(reading["at"])).to(log_q)
        return -rows.sum(advantages * log_q), rows.sum(advantages > 0), rows.sum(advantages < 0)


class RLTFSDSection(TurnOptions):
    """Learn what was written after feedback as an answer to the prompt alone, beside rewards for every turn."""

    method: ClassVar = RLTFSD
    name: Literal["rltf_sd"] = "rltf_sd"
    policy_weight: float = Field(1.0, ge=0)
    """Factor on the policy gradient of the episodes themselves; 0 leaves it out."""
    negative_cap: float = Field(math.inf, ge=0)
    """Largest size of a negative advantage of a later attempt; 0 learns from those that are better only."""
