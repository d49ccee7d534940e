"""EarlierSelf: next tokens, softened by what the student thought of them when its last generation ended."""

from functools import partial
from typing import Any, ClassVar

from kdlm.losses import CrossEntropy, kept_rows, progressive_cross_entropy
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.self_distillation.generations import Generations
from kdlm.methods.tokens import TokenMethod
from kdlm.roles import Role, Trainable
from kdlm.signal import weights_of


class EarlierSelf(TokenMethod):
    """Cross-entropy under `(1 - share) onehot(label) + share p`, p of the role `previous`; a subclass says the share.

    Args:
        losses: none, the target is the method's own.
        generation_steps: optimiser steps after which `previous` is the student of that moment; None: an epoch.
    """

    needs = frozenset({"labels"})
    term: ClassVar[str]
    """What the loss is called where it is logged."""
    weighs = True

    def __init__(self, losses=(), *, generation_steps: int | None = None, **options: Any):
        super().__init__(losses, **options)
        self.generations = Generations(generation_steps)

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "previous": self.generations.previous}

    def share(self, step: Step) -> float:
        """Return the share of `previous` in the target of this step; 0 asks for nobody."""
        raise NotImplementedError

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        share, student = self.share(step), nets["student"](batch, rows)
        if not share:
            return self.compare(student, None, rows, step, weighted=[(self.term, CrossEntropy(), 1.0)])
        target = (self.term, partial(_softened, share=share), 1.0)
        return self.compare(student, nets["previous"](batch, rows), rows, step, weighted=[target])

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own loss and cross-entropy."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        plain = self.compare(nets["student"](batch, rows), None, rows, step, ("cross_entropy",), [])
        terms = self.losses(nets, batch, frozenset(), step)
        return Terms(terms.terms, terms.metrics | plain.metrics)


def _softened(student: Any, previous: Any, labels: Any, *, share: float) -> Any:
    return progressive_cross_entropy(student, previous, labels, share=share)
