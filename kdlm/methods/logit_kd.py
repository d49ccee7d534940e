"""Token-level distillation with any divergence, or any weighted sum of them, on given text."""

from typing import ClassVar, Literal

from kdlm.methods.tokens import TokenMethod, TokenOptions


class LogitKD(TokenMethod):
    """Match the teacher's next-token distribution on given text (Hinton et al. 2015, arXiv 1503.02531)."""

    paper = "arXiv 1503.02531"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"} | {"teacher" for loss in self.token_losses.values() if loss.needs_teacher})


class LogitKDSection(TokenOptions):
    """Match the teacher's next-token distribution with the recipe's `losses`."""

    method: ClassVar = LogitKD
    name: Literal["logit_kd"] = "logit_kd"

    def build(self, losses, vocab) -> TokenMethod:
        if not losses:
            raise ValueError("losses: logit_kd needs at least one, e.g. [{name: forward_kl}]")
        return super().build(losses, vocab)
