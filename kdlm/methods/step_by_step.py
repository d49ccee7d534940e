"""Distilling step-by-step: tasks side by side, the cross-entropy of each averaged over its own tokens."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import CrossEntropy, count_kept, kept_rows, measures_for, weighted_sum
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import rows_of
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Rows, domain_id, sequence_of, weights_of


class StepByStep(TokenMethod):
    """Label and rationale as two tasks of one student (Hsieh et al. 2023, arXiv 2305.02301, equation 4).

        L = a CE(label | "[label] " + x) + (1 - a) CE(rationale | "[rationale] " + x),  a = 0.5

    A prompt says which of the two it asks for, so that nothing of a rationale is paid for at use. Each term is a mean
    over the tokens of its own task in the whole optimiser step: long rationales do not drown short labels. In the
    released code (T5) the two are two forward passes of one batch of the same examples; here they are rows of the data,
    told apart by their domain, and any number of them makes a batch, of one task or of both.

    Args:
        tasks: weight of each task, by the domain of its rows.

    Raises ValueError for a row of another domain.
    """

    paper = "arXiv 2305.02301"
    needs = frozenset({"labels"})
    weighs = True

    def __init__(self, losses=(), *, tasks: dict[str, float], **options):
        super().__init__(losses, **options)
        self.tasks = tasks

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        numbers = self._numbers(batch["domain"])
        labels, task = batch["labels"], batch["domain"][sequence_of(batch)]
        if bool((batch["domain"][:, None] != numbers).all(1).any()):
            raise ValueError(
                f"method.tasks: a row of a domain that is none of {', '.join(self.tasks)}: say `domain: label` of its "
                "source, or map a column with `columns: {domain: task}`"
            )
        own = {
            f"{name}_tokens": count_kept(labels.masked_fill(task != number, IGNORE_INDEX), weights_of(batch))
            for name, number in zip(self.tasks, numbers, strict=True)
        }
        return super().counts(batch) | own

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        return self._by_task(nets["student"](batch, rows), rows, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and every measure over all tasks' tokens."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        return self._by_task(nets["student"](batch, rows), rows, batch, step, measures_for(None))

    def _by_task(
        self, student: Hidden | Dense, rows: Rows, batch: Batch, step: Step, measures: Sequence[str] = ()
    ) -> Terms:
        options = {"vocab": self.vocab, "chunk_rows": self.chunk_rows, "impl": self.impl}
        total, found = weighted_sum(self.weighted(step), student, None, rows.labels, measures=measures, **options)
        task, nothing = rows_of(batch["domain"], batch, rows), total.detach()[:0]
        terms = {
            name: Term(rows.sum(total * (task == number)), f"{name}_tokens", weight)
            for (name, weight), number in zip(self.tasks.items(), self._numbers(task), strict=True)
        }
        return Terms(terms, {name: (rows.sum(found.get(name, nothing)), "tokens") for name in measures})

    def _numbers(self, beside: Tensor) -> Tensor:
        """Return the numbers of the tasks' domains."""
        return torch.tensor([domain_id(name) for name in self.tasks], device=beside.device)


class StepByStepSection(TokenOptions):
    """Several tasks side by side, such as label and rationale, each averaged over its own tokens."""

    method: ClassVar = StepByStep
    name: Literal["step_by_step"] = "step_by_step"
    tasks: dict[str, float] = Field({"label": 0.5, "rationale": 0.5}, min_length=1)
    """Weight of each task, by the domain of its rows: the paper's a and 1 - a."""

    def build(self, losses, vocab) -> TokenMethod:
        if others := [loss.name for loss in losses if loss.name != "cross_entropy"]:
            raise ValueError(f"losses: step_by_step takes cross_entropy only, not {', '.join(others)}; use logit_kd")
        return super().build(losses or [CrossEntropy()], vocab)
