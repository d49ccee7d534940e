"""Recursive distillation: generations that learn from the last one, anchored on one teacher that stays."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kdlm.losses import ForwardKL, kept_rows, measures_for
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.self_distillation.generations import Generations, InGenerations
from kdlm.methods.tokens import TokenMethod
from kdlm.roles import Role, Trainable
from kdlm.signal import Dense, Hidden, Mixture, Rows, weights_of


class RecursiveKD(TokenMethod):
    """Generation n + 1 learns from `(1 - a) p_n + a p_0`: the last generation, and the base (arXiv 2601.13100).

    The base is the recipe's teacher: another model, or `{name: self, weights: start}`, the student as it began. The
    first generation has the base alone; from then on the role `previous`, a copy of the student taken as a generation
    ends, is p_n. A student that matched its target would have `KL(p_{n+1} || p_0) <= (1 - a) KL(p_n || p_0)` (KL is
    convex); one that misses it by some error stays within the order of that over a, and without an anchor (a = 0)
    errors add up. Evaluation measures against the base.

    The paper is known by its abstract alone: the target and the bound are ours from its words. A generation goes on
    from the weights of the last; with fresh ones it is a chain of runs with an ensemble as the teacher
    (recipes/sandbox/generations).

    Args:
        losses: token losses against the target; forward KL by default.
        anchor: a, the base's share.
        generation_steps: optimiser steps that a generation lasts; None: an epoch.
    """

    paper = "arXiv 2601.13100"
    needs = frozenset({"labels", "teacher"})
    weighs = True

    def __init__(self, losses=(), *, anchor=0.3, generation_steps: int | None = None, **options):
        super().__init__(losses or [ForwardKL()], **options)
        self.anchor, self.generations = anchor, Generations(generation_steps)

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "previous": self.generations.previous}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        target = self._target(nets, batch, rows, step, nets["teacher"](batch, rows))
        return self.compare(nets["student"](batch, rows), target, rows, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own losses, and every measure that can be taken with the base: the bound is on reverse KL."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        student, base = nets["student"](batch, rows), nets["teacher"](batch, rows)
        terms = self.compare(student, self._target(nets, batch, rows, step, base), rows, step)
        measures = dict.fromkeys((*measures_for(type(base)), "reverse_kl_to_teacher"))
        return Terms(terms.terms, terms.metrics | self.compare(student, base, rows, step, [*measures], []).metrics)

    def _target(self, nets: Nets, batch: Batch, rows: Rows, step: Step, base: object) -> Hidden | Dense | Mixture:
        """Return what this generation learns from. Raises ValueError where the base gives no whole distributions."""
        if not isinstance(base, Hidden | Dense):
            raise ValueError(
                f"teacher: recursive_kd averages whole distributions (Hidden or Dense), this one gives a "
                f"{type(base).__name__} signal"
            )
        if not self.generations.ended(step):
            return base
        shares = torch.tensor([1 - self.anchor, self.anchor], device=rows.index.device).log()
        return Mixture((nets["previous"](batch, rows), base), shares.expand(len(rows), 2))


class RecursiveKDSection(InGenerations):
    """Learn from the teacher, then from a mixture of it and what the student was when its last generation ended."""

    method: ClassVar = RecursiveKD
    name: Literal["recursive_kd"] = "recursive_kd"
    anchor: float = Field(0.3, ge=0, le=1)
    """Share of the teacher in the target of every generation after the first; 0 lets errors add up."""
