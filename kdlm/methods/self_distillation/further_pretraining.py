"""Further pre-training with self-distillation: from the initial weights again, towards what they became."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdlm.losses import CrossEntropy, count_kept, kept_rows, measures_for
from kdlm.losses.distributions import widen
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import count_sequences, group_rows
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Dense, Hidden, Rows, Signal, sequence_of, summed, weights_of


class FurtherPretraining(TokenMethod):
    """Language modelling, and `weight |h_s - sg h_T|^2` to the teacher's last hidden states (ICLR 2023, 2210.02871).

    Two runs: the initial model is pre-trained further on the new text (`sequence_kd`); then the student begins from the
    initial weights again, and this method trains it on the same text with the first run's model as its teacher. The
    paper fine-tunes the student afterwards. h is the state after the last norm, on which the head works; both models
    have equal widths.

    For images, a description of the released code has h as the class token of the unmasked image; the code itself was
    not read. A causal model hides nothing from itself, so one pass serves both terms here; anchoring every token (or
    `over` sequences the mean of theirs) in place of the class token is ours.

    Args:
        losses: the language-model objective; cross-entropy by default.
        weight: of the anchor; 0 is the first run over again.
        over: an anchor for each of the `tokens`, or one for the mean state of each of the `sequences`.
        reduction: over the width: the paper's `sum`, whose size grows with it, or the `mean`.
    """

    paper = "arXiv 2210.02871"
    needs = frozenset({"labels", "teacher", "teacher.layers"})
    weighs = True

    def __init__(
        self,
        losses=(),
        *,
        weight=1.0,
        over: Literal["tokens", "sequences"] = "tokens",
        reduction: Literal["sum", "mean"] = "sum",
        **options,
    ):
        super().__init__(losses or [CrossEntropy()], **options)
        self.weight, self.over, self.reduction = weight, over, reduction

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": count_kept(batch["labels"], weights_of(batch)), "sequences": count_sequences(batch)}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._anchored(nets, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and every measure that can be taken with this teacher."""
        return self._anchored(nets, batch, step, measured=True)

    def _anchored(self, nets: Nets, batch: Batch, step: Step, *, measured: bool = False) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        student, teacher = nets["student"](batch, rows), nets["teacher"](batch, rows)
        measures = measures_for(type(teacher)) if measured else ()
        listens = measured or any(loss.needs_teacher for loss in self.token_losses.values())
        terms = self.compare(student, teacher if listens else None, rows, step, measures)
        anchor = self._anchor(_states("student", student), _states("teacher", teacher), batch, rows)
        named = {"anchor": (anchor.detach(), self.over)}
        return Terms({**terms.terms, "anchor": Term(anchor, self.over, self.weight)}, terms.metrics | named)

    def _anchor(self, ours: Tensor, theirs: Tensor, batch: Batch, rows: Rows) -> Tensor:
        """Return the squared distance, summed over tokens or sequences. Raises ValueError where widths differ."""
        if ours.shape != theirs.shape:
            raise ValueError(
                f"teacher: its hidden states are {theirs.shape[-1]} wide and the student's {ours.shape[-1]}: "
                "further_pretraining takes the student's own model, pre-trained further"
            )
        difference, weights = ours - theirs.detach().to(ours), rows.weights
        if self.over == "sequences":
            numbers = rows.of_labels(sequence_of(batch))
            group, lengths = group_rows(numbers)
            states = difference.new_zeros(len(lengths), difference.shape[-1]).index_add(0, group, difference)
            difference = states / lengths[:, None].to(states)
            weights = batch["weight"][numbers.unique()] if "weight" in batch else None
        squared = summed(difference.square(), None if weights is None else weights[:, None])
        return squared if self.reduction == "sum" else squared / difference.shape[-1]


def _states(role: str, signal: Signal) -> Tensor:
    """Return last hidden states in at least fp32. Raises ValueError where a model gives logits alone."""
    if isinstance(signal, Hidden):
        return widen(signal.hidden)
    why = "set teacher.signal: hidden" if role == "teacher" and isinstance(signal, Dense) else "it cannot be anchored"
    raise ValueError(f"{role}: further_pretraining reads last hidden states, and this one gives logits: {why}")


class FurtherPretrainingSection(TokenOptions):
    """Pre-train further from the initial weights, hidden states anchored on those of a model that did so before."""

    method: ClassVar = FurtherPretraining
    name: Literal["further_pretraining"] = "further_pretraining"
    weight: float = Field(1.0, ge=0)
    """Weight of the squared distance of last hidden states."""
    over: Literal["tokens", "sequences"] = "tokens"
    """Anchor the state of each token, or the mean state of each sequence."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the width of the states: the paper's `sum`, or the `mean`, which is the same at any width."""
