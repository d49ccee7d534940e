"""Distillation between two masked language models, or the training of one."""

from typing import ClassVar, Literal

from kdlm.methods.masked.masking import MaskedMethod
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.tokens import TokenMethod, TokenOptions


class MaskedKD(MaskedMethod):
    """Match the teacher at hidden tokens, both reading the same masked text, each text's sum weighted by L over k.

    With cross-entropy it is the training of a masked diffusion language model (LLaDA, arXiv 2502.09992; MDLM, arXiv
    2406.07524), the bound on the negative log-likelihood in nats a token. With forward KL the weighted sum is the KL
    between what teacher and student make of a masked text on its way back to the data, where texts are the data's. The
    loss is divided by all trained tokens of the step, hidden or not.
    """

    paper = "arXiv 2502.09992, 2406.07524"
    weighs = True

    @property
    def needs(self) -> frozenset[str]:
        teacher = {"teacher.unmasking" for loss in self.token_losses.values() if loss.needs_teacher}
        return frozenset({"labels", "unmasking"} | teacher)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        seen = self.hide(nets, batch, step.seed, step.index)
        teacher = nets["teacher"](seen.batch, seen.rows) if "teacher.unmasking" in self.needs else None
        return self.compare(nets["student"](seen.batch, seen.rows), teacher, seen.rows, step, row_weights=seen.weights)


class MaskedKDSection(TokenOptions):
    """The recipe's `losses` at hidden tokens, between two masked language models."""

    method: ClassVar = MaskedKD
    name: Literal["masked_kd"] = "masked_kd"

    def build(self, losses, vocab) -> TokenMethod:
        if not losses:
            raise ValueError(
                "losses: masked_kd needs at least one, e.g. [{name: forward_kl}] or [{name: cross_entropy}]"
            )
        return super().build(losses, vocab)
