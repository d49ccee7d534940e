"""Token-level distillation with any divergence, or any weighted sum of them, on given text."""

from typing import Literal

from pydantic import Field

from kdlm.methods.tokens import TokenMethod
from kdlm.section import Section


class LogitKD(TokenMethod):
    """Match the teacher's next-token distribution on given text (Hinton et al. 2015, arXiv 1503.02531)."""

    paper = "arXiv 1503.02531"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"} | {"teacher" for loss in self.token_losses.values() if loss.needs_teacher})


class TokenOptions(Section):
    """How the token losses are computed."""

    chunk_rows: int | None = Field(None, ge=1)
    """Rows projected to the vocabulary at a time; by default chosen from the sizes. Changes memory, not the result."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the losses: `torch` (the reference), `triton` (fused kernels, where there are any), or auto."""


class LogitKDSection(TokenOptions):
    """Match the teacher's next-token distribution with the recipe's `losses`."""

    name: Literal["logit_kd"] = "logit_kd"

    def build(self, losses, vocab) -> LogitKD:
        if not losses:
            raise ValueError("losses: logit_kd needs at least one, e.g. [{name: forward_kl}]")
        return LogitKD(losses, vocab=vocab, chunk_rows=self.chunk_rows, impl=self.impl)
