"""PS-KD of text: progressive self-knowledge distillation (ICCV 2021, arXiv 2006.12000)."""

from typing import ClassVar, Literal

from pydantic import Field

from kdlm.methods.method import Step
from kdlm.methods.self_distillation.earlier_self import EarlierSelf
from kdlm.methods.self_distillation.own_loss import OwnLoss
from kdlm.methods.tokens import TokenOptions


def share_at(step: Step, end: float) -> float:
    """Return the share of the student's own predictions of an epoch ago in the target: `end e / E` in epoch e of E.

    Nothing has been predicted in the first epoch, whose share is 0; in the last it is `end`.
    """
    return end * min(step.epoch + 1, step.epochs) / step.epochs if step.epoch else 0.0


class TokenPSKD(EarlierSelf):
    """Cross-entropy to the next token and what the student itself thought of it an epoch ago: PS-KD of text.

    As `PSKD`: the role `previous`, a copy of the student taken when an epoch ends, scores the same text again. The
    paper and its released code store what each training pass predicted. The shares are those of the released code.

    Args:
        losses: none, the target is the method's own.
        end: share of the earlier predictions in the last epoch.
    """

    paper = "arXiv 2006.12000"
    term = "ps_kd"

    def __init__(self, losses=(), *, end=0.8, **options):
        super().__init__(losses, **options)
        self.end = end

    def share(self, step: Step) -> float:
        return share_at(step, self.end)


class Progressing(OwnLoss):
    """What can be asked of PS-KD, whatever it learns."""

    end: float = Field(0.8, ge=0, lt=1)
    """Share of the earlier predictions in the target of the last epoch; it grows in even steps, from 0 in the first."""


class TokenPSKDSection(Progressing, TokenOptions):
    """Learn from next tokens softened by the student's own predictions of an epoch ago; no teacher, no `losses`."""

    method: ClassVar = TokenPSKD
    name: Literal["token_ps_kd"] = "token_ps_kd"
