"""RLTF-FM: a policy that also learns to foresee what the verifier will say of it."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses import kept_rows
from kdlm.methods.method import Batch, Term, Terms
from kdlm.methods.turns import TurnOptions, TurnRewards, said_in
from kdlm.signal import Rows, summed, weights_of


class RLTFFM(TurnRewards):
    """RL from text feedback, by a model of the feedback (arXiv 2602.02482): `J - lambda CE(f | x0, y0)`.

    J is the policy gradient of both turns, each by its own advantage; the cross-entropy is that of every token that the
    environment says between two turns, in the mean over them. Here, and in no other method, these tokens carry loss.
    What is said after an episode's last turn is in no batch, and not foreseen.

    The formula is from third-party notes; the authors' code was not read, and their lambda is not known here. Our tests
    hold that lambda 0 is the policy gradient alone, and that the term is the cross-entropy of those tokens.

    Args:
        losses: token losses to a teacher, at the tokens that the student drew.
        feedback_weight: lambda.
        options: as of `TurnRewards`.
    """

    paper = "arXiv 2602.02482"

    def __init__(self, losses=(), *, feedback_weight: float = 0.1, **options: Any):
        super().__init__(losses, **options)
        self.feedback_weight = feedback_weight

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count also the tokens that an environment said."""
        counts = super().counts(batch)
        said = summed(said_in(batch), weights_of(batch)) if "turn" in batch else torch.zeros_like(counts["tokens"])
        return counts | {"said": said}

    def rows(self, batch: Batch) -> Rows:
        return kept_rows(torch.where(said_in(batch), batch["input_ids"], batch["labels"]), weights_of(batch))

    def rewarded(self, log_q: Float[Tensor, "rows"], entropy: Float[Tensor, "rows"], rows: Rows, batch: Batch) -> Terms:
        found = super().rewarded(log_q, entropy, rows, batch)
        said = rows.of_labels(said_in(batch)).to(log_q)
        feedback = Term(-rows.sum(said * log_q), "said", self.feedback_weight)
        return Terms(found.terms | {"feedback": feedback}, found.metrics)


class RLTFFMSection(TurnOptions):
    """Rewards for every turn, and cross-entropy on the words of the environment."""

    method: ClassVar = RLTFFM
    name: Literal["rltf_fm"] = "rltf_fm"
    feedback_weight: float = Field(0.1, ge=0)
    """Factor on the cross-entropy of what the environment says, in nats a token."""
