"""MiniLLM: policy gradient of the reverse KL of whole sequences (ICLR 2024, arXiv 2306.08543)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import ReverseKL, chunked, returns
from kdlm.methods.method import Term
from kdlm.methods.policy import PolicyMethod, PolicyOptions
from kdlm.signal import Dense, Hidden, LogProbs, Rows, Signal


class MiniLLM(PolicyMethod):
    """Reverse KL of whole sequences: each token also answers for what comes after it (ICLR 2024, arXiv 2306.08543).

    The gradient of KL(q || p) over sequences is `-E_q sum_i R_i grad log q(y_i)`, `R_i = sum_{j >= i} r_j` with the
    rewards `r_j = log p(y_j) - log q(y_j)`. (The paper's R_i - 1 has the same mean, as any constant has.) Its three
    means against variance:

    - single step: r_i, the token's own reward, is replaced by what it stands for in mean, reverse KL over the whole
      vocabulary, and only the rewards of later tokens are left to the policy gradient;
    - length normalisation: the sum of rewards is divided by its number of terms, the token's own place included, so
      that the weights tend to reverse KL per position as the discount goes to 0;
    - text drawn from a mixture with the teacher, `a p + (1 - a) q`: an engine's matter. Its log-probabilities are in
      the batch, and the importance weights follow from them. They correct for the token, not for what comes before or
      after it, and leave the single step alone, as in the released code.

    Cross-entropy in `losses`, on the data's own text, is the pretraining loss. Not here: the released code's PPO
    clipping and whitening.

    Args:
        discount: factor on a reward per token of distance; 0 with `single_step` is reverse KL per position.
        single_step: whether a token's own reward is taken in mean; needs a teacher that gives distributions.
        length_normalisation: whether sums of rewards become means.
    """

    paper = "arXiv 2306.08543"

    def __init__(self, losses=(), *, discount=1.0, single_step=True, length_normalisation=True, **options):
        super().__init__(losses, **options)
        self.discount, self.single_step, self.length_normalisation = discount, single_step, length_normalisation

    @property
    def signals(self) -> frozenset[type]:
        return super().signals - {LogProbs} if self.single_step else super().signals

    def advantages(self, rewards: Tensor, sequence: Tensor) -> Tensor:
        total = returns(rewards, sequence, self.discount)
        if self.single_step:
            total = total - rewards
        if self.length_normalisation:
            total = total / returns(torch.ones_like(rewards), sequence, self.discount)
        return total

    def exact(self, student: Hidden | Dense, teacher: Signal | None, rows: Rows, sampled: Tensor) -> dict[str, Term]:
        if not self.single_step:
            return {}
        if isinstance(teacher, LogProbs):
            raise ValueError(
                "method.single_step: it compares distributions, and this teacher scores sampled tokens only; set false"
            )
        call = {"vocab": self.vocab, "chunk_rows": self.chunk_rows, "impl": self.impl}
        value = chunked(ReverseKL(), student, teacher, weights=sampled, **call)
        return {"single_step": Term(rows.sum(value), "sampled")}


class MiniLLMSection(PolicyOptions):
    """Lower the reverse KL of whole sequences by policy gradient."""

    method: ClassVar = MiniLLM
    name: Literal["minillm"] = "minillm"
    discount: float = Field(1.0, ge=0, le=1)
    """Factor on a later reward per token of distance; 0 with `single_step` is reverse KL per position."""
    single_step: bool = True
    """Take a token's own reward in mean, as reverse KL over the whole vocabulary; needs the teacher's distributions."""
    length_normalisation: bool = True
    """Divide a token's sum of rewards by the number of its terms."""
