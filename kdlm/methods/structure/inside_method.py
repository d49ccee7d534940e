"""What methods on the inside of a student share: one reading of student and teacher, and predictions beside it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from kdlm.losses import Loss, count_kept, count_real, kept_rows, measures_for, real_rows
from kdlm.methods.class_kd import ClassKD
from kdlm.methods.masked.masking import EVALUATION, Texts, masked, padded
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.tokens import TokenMethod
from kdlm.models import Ask, Inside
from kdlm.signal import Rows, weights_of


class Seen(NamedTuple):
    """What both networks read, the rows that are predicted (None: nothing is), and by how much those count."""

    batch: Batch
    predicted: Rows | None
    weights: Tensor | None = None


class InsideMethod(TokenMethod):
    """Compares student and teacher inside, at every token that is no padding; with losses, also what they predict.

    Both are causal language models, masked ones, or classifiers of texts, of one tokenizer; also of two kinds, where no
    loss listens to the teacher. A masked student reads its text with tokens hidden, as in `masked_kd`, and predicts
    those; a classifier predicts the class of a text that has one. A subclass says what it asks for and what it makes
    of it: one value for each token, whose mean over all tokens of the step is its term. Without losses nothing is
    predicted, and layers above those that are compared are not run, on neither side.

    Args:
        losses: on predictions: of tokens, or of classes.
    """

    needs = frozenset({"teacher.layers"})
    any_text_model = True
    paced_by = "positions"
    weighs = True

    def __init__(self, losses: Sequence[Loss] = (), **options: Any):
        super().__init__(losses, **options)
        self.of_classes = ClassKD(losses)

    @property
    def leaves_unused(self) -> bool:
        return not self.token_losses  # what lies above the last layer that is compared

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        if batch["labels"].dim() == 1:
            return {"positions": count_real(batch), **self.of_classes.counts(batch)}
        return {"positions": count_real(batch), "tokens": count_kept(batch["labels"], weights_of(batch))}

    def asks(self, student: Any, teacher: Any) -> tuple[Ask, Ask]:
        """Return what is wanted of the student's inside and of the teacher's. Raises ValueError for what cannot be."""
        raise NotImplementedError

    def compared_inside(
        self, nets: Nets, batch: Batch, rows: Rows, ours: Inside, theirs: Inside
    ) -> dict[str, tuple[Float[Tensor, "rows"], float]]:
        """Return a value of each row, and its weight in the loss, by name; `ours` is in the student's graph."""
        raise NotImplementedError

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._match(nets, batch, step, step.index)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and all that can be said of predictions."""
        return self._match(nets, batch, step, EVALUATION, measured=True)

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        return self.of_classes.summarised(means)

    def _match(self, nets: Nets, batch: Batch, step: Step, draw: int, *, measured: bool = False) -> Terms:
        seen = self._seen(nets, batch, step.seed, draw)
        rows, wanted = real_rows(seen.batch), seen.predicted if self.token_losses or measured else None
        ours, theirs = self.asks(nets["student"], nets["teacher"])
        student, inside = nets["student"].inside(seen.batch, rows, ours, wanted)
        listens = any(loss.needs_teacher for loss in self.token_losses.values())
        heard = wanted if (measured or listens) and self._comparable(nets, batch, listens) else None
        teacher, wished = nets["teacher"].inside(seen.batch, rows, theirs, heard)
        terms: dict[str, Term] = {}
        metrics: dict[str, tuple[Tensor, str]] = {}
        for name, (values, weight) in self.compared_inside(nets, seen.batch, rows, inside, wished).items():
            total = rows.sum(values)
            terms[name], metrics[name] = Term(total, "positions", weight), (total.detach(), "positions")
        if student is not None:
            said = self._predictions(student, teacher, seen, batch, step, measured)
            terms |= said.terms if self.token_losses else {}
            metrics |= said.metrics
        return Terms(terms, metrics)

    def _seen(self, nets: Nets, batch: Batch, seed: int, draw: int) -> Seen:
        student, labels = nets["student"], batch["labels"]
        if labels.dim() == 1:  # a class for each text
            return Seen(batch, Rows(labels.new_zeros(0), labels.new_zeros(0)))
        if student.mask_id is not None:
            texts = Texts.of(batch)
            hidden = masked(texts, texts.hidden(seed, draw), student.mask_id)
            weight = {} if texts.weight is None else {"weight": texts.weight}
            return Seen(hidden.batch | weight, hidden.rows, hidden.weights)
        if not student.tells_classes:
            return Seen(batch, kept_rows(labels, weights_of(batch)))
        if self.token_losses:
            raise ValueError("losses: the student tells classes, and these texts have none: leave losses out")
        return Seen(batch if student.causal else padded(batch), None)

    def _comparable(self, nets: Nets, batch: Batch, listens: bool) -> bool:
        """Whether the teacher predicts what the student does. Raises ValueError where it must and does not."""
        same = nets["teacher"].tells_classes == (batch["labels"].dim() == 1)
        if listens and not same:
            raise ValueError(
                "losses: student and teacher do not predict the same, a class or tokens: leave out the losses that "
                "listen to the teacher, or take a teacher of the student's kind"
            )
        return same

    def _predictions(self, student: Any, teacher: Any, seen: Seen, batch: Batch, step: Step, measured: bool) -> Terms:
        if batch["labels"].dim() == 1:
            logits = None if teacher is None else teacher.logits
            return self.of_classes.said(student.logits, logits, batch["labels"], step, measured=measured)
        assert seen.predicted is not None
        measures = measures_for(None if teacher is None else type(teacher)) if measured else ()
        return self.compare(student, teacher, seen.predicted, step, measures, row_weights=seen.weights)


def of_one_direction(student: Any, teacher: Any) -> bool:
    """Return whether both see only what is before a token. Raises ValueError where one of them does."""
    if student.causal != teacher.causal:
        raise ValueError(
            "method: one of student and teacher sees only what is before a token, and the other all of a text: "
            "their attention cannot be compared; take two causal models, or two that are not"
        )
    return student.causal
