"""Generations that learn from the last one and from the labels again ("Even Your Teacher Needs Guidance")."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdlm.methods.method import Step
from kdlm.methods.self_distillation.earlier_self import EarlierSelf
from kdlm.methods.self_distillation.generations import InGenerations
from kdlm.methods.self_distillation.own_loss import OwnLoss


class GuidedGenerations(EarlierSelf):
    """Generation k learns `a_k l(f, y) + (1 - a_k) l(f, f_{k-1})` (NeurIPS 2021, arXiv 2102.13088), the first y alone.

    The role `previous`, a copy of the student taken as a generation ends, is f_{k-1} for the next one. For kernel ridge
    with penalty lam, any fixed share a ends at the solution for `lam / a`; at 0 each generation shrinks what is left,
    to 0 in the end. So the labels' share sets how much the whole line is regularised. `kdlm.losses.label_share`
    estimates the best one from two students and held-out rows.

    Two differences from the paper's released code: l is cross-entropy (theirs is the squared error of probabilities),
    and a generation goes on from the weights of the last, while theirs begins from fresh ones. With fresh weights it is
    a chain of `logit_kd` runs, whose losses are cross-entropy, weighing a, and forward KL, 1 - a: the same gradient.

    Args:
        losses: none, the target is the method's own.
        label_share: a, or one for each generation after the first; the last of them holds for all that follow.
        generation_steps: optimiser steps that a generation lasts; None: an epoch.
    """

    paper = "arXiv 2102.13088"
    term = "guided"

    def __init__(self, losses=(), *, label_share: float | Sequence[float] = 0.5, **options):
        super().__init__(losses, **options)
        self.label_shares = [label_share] if isinstance(label_share, float | int) else list(label_share)

    def share(self, step: Step) -> float:
        ended = self.generations.ended(step)
        return 1 - self.label_shares[min(ended, len(self.label_shares)) - 1] if ended else 0.0


Share = Annotated[float, Field(ge=0, le=1)]


class GuidedGenerationsSection(OwnLoss, InGenerations):
    """Learn next tokens, then again and again from them and from what the last generation of itself says of them."""

    method: ClassVar = GuidedGenerations
    name: Literal["guided_generations"] = "guided_generations"
    label_share: Share | Annotated[list[Share], Field(min_length=1)] = 0.5
    """Share of the labels in the target of every generation after the first; or one for each of those, the last of
    which holds for all that follow."""
