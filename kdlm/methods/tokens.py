"""Methods whose loss is a weighted sum of token losses between the student and one teacher."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.losses import Loss, kept_rows, measures_for, numbered_names, weighted_sum
from kdlm.methods.method import Batch, Method, Nets, Step, Term, Terms
from kdlm.section import Section
from kdlm.signal import Dense, Hidden, Rows, Signal, weights_of

Weighted = tuple[str, Callable[..., Tensor], float]


class TokenMethod(Method):
    """Sums token losses at the kept positions, all of them in one pass over the logits, each by its row's weight.

    A subclass that sums on its own does so by `Rows.sum` and `over_sequences`, and counts by `weights_of`.

    Args:
        losses: the token losses and their weights.
        vocab: ids that both tokenizers share: the first n, a list of ids, or None when the heads are alike.
        chunk_rows: rows projected to the vocabulary at a time; None lets the loss choose.
        impl: `auto`, `torch` or `triton`.
    """

    weighs = True
    by_rows = True

    def __init__(
        self,
        losses: Sequence[Loss] = (),
        *,
        vocab: int | Tensor | None = None,
        chunk_rows: int | None = None,
        impl: Literal["auto", "torch", "triton"] = "auto",
    ):
        self.token_losses = dict(zip(numbered_names(losses), losses, strict=True))
        self.vocab, self.chunk_rows = vocab, chunk_rows
        self.impl: Literal["auto", "torch", "triton"] = impl

    def weighted(self, step: Step) -> list[Weighted]:
        """Return the token losses of this step as (name, function, weight)."""
        return [(name, loss, loss.weight_at(step.progress, step.index)) for name, loss in self.token_losses.items()]

    def ask_teacher(self, nets: Nets, batch: Batch, rows: Rows) -> Signal | None:
        """Return the teacher's signal, or None where no loss of this method listens to it."""
        return nets["teacher"](batch, rows) if "teacher" in self.needs else None

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher = self.ask_teacher(nets, batch, rows)
        return self.compare(nets["student"](batch, rows), teacher, rows, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own losses, and every measure that can be taken with this teacher."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher = nets["teacher"](batch, rows) if "teacher" in nets else None
        measures = measures_for(None if teacher is None else type(teacher))
        return self.compare(nets["student"](batch, rows), teacher, rows, step, measures)

    def compare(
        self,
        student: Hidden | Dense,
        teacher: Signal | None,
        rows: Rows,
        step: Step,
        measures: Sequence[str] = (),
        weighted: Sequence[Weighted] | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        row_weights: Tensor | None = None,
        unit: str = "tokens",
    ) -> Terms:
        """Sum token losses over `rows` into one differentiable term, with each loss's own sum beside it.

        They are those of this step unless `weighted` names others; `weigh` makes of the rows' values what is summed,
        and `row_weights` `[rows]` weigh the rows of all sums, the metrics' too. `unit` is what `rows` are counted as.
        """
        weighted = self.weighted(step) if weighted is None else weighted
        total, parts = weighted_sum(
            weighted,
            student,
            teacher,
            rows.labels,
            vocab=self.vocab,
            measures=measures,
            chunk_rows=self.chunk_rows,
            impl=self.impl,
        )
        # A batch without rows has no parts; every rank must still report the same names.
        names = dict.fromkeys([*(name for name, _, _ in weighted), *measures])
        nothing = total.detach()[:0]
        if row_weights is not None:
            total, parts = total * row_weights, {name: part * row_weights for name, part in parts.items()}
        metrics = {name: (rows.sum(parts.get(name, nothing)), unit) for name in names}
        return Terms({"token_loss": Term(rows.sum(total if weigh is None else weigh(total)), unit)}, metrics)

    def measured(self, student: Hidden | Dense, teacher: Signal, rows: Rows) -> dict[str, tuple[Tensor, str]]:
        """Return every measure that can be taken with this teacher, summed over `rows`."""
        options = {"vocab": self.vocab, "measures": measures_for(type(teacher)), "chunk_rows": self.chunk_rows}
        _, parts = weighted_sum([], student, teacher, rows.labels, **options, impl=self.impl)
        return {name: (rows.sum(value), "tokens") for name, value in parts.items()}


class TokenOptions(Section):
    """What can be asked of any method that sums token losses. Every other field goes to the method by its name."""

    method: ClassVar[type[TokenMethod]]
    """The method that this Section configures."""

    chunk_rows: int | None = Field(None, ge=1)
    """Rows projected to the vocabulary at a time; by default chosen from the sizes. Changes memory, not the result."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the losses: `triton` (fused kernels, on CUDA), `torch`, or auto, the better that can run."""

    def build(self, losses: Sequence[Loss], vocab: int | Tensor | None) -> TokenMethod:
        """Return the method with the recipe's losses and the ids that both tokenizers share."""
        options: dict[str, Any] = {key: value for key, value in self if key != "name"}
        return self.method(losses, vocab=vocab, **options)
