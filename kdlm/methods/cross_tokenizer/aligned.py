"""Methods that compare a student and a teacher with another tokenizer, where their readings of a text meet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor

from kdlm.losses import (
    Loss,
    count_kept,
    kept_rows,
    label_log_probs,
    numbered_names,
    teacher_log_probs,
    token_log_probs,
)
from kdlm.methods.method import Batch, Nets, Step, Terms
from kdlm.methods.sequences import over_sequences
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import Dense, Hidden, Rows, Sampled, Signal, TopK, weights_of
from kdlm.spelling import Spelling


@dataclass(frozen=True)
class Readings:
    """What student and teacher say of the trained tokens of a batch, each of its own tokens.

    A chunk is a span of text whose ends are token boundaries of both (`kdlm.data.alignment`); chunks are numbered from
    0 over the batch.

    Attributes:
        rows, their_rows: the kept positions of either reading.
        student, teacher: their signals there.
        chunks, their_chunks: the chunk of the token that each row predicts; -1 where it is in none.
    """

    rows: Rows
    student: Hidden | Dense
    chunks: Int[Tensor, "rows"]
    their_rows: Rows
    teacher: Signal
    their_chunks: Int[Tensor, "their_rows"]

    @property
    def size(self) -> int:
        """At least the number of chunks, known without waiting for the device."""
        return min(len(self.rows), len(self.their_rows))

    def over_chunks(self, values: Shaped[Tensor, "rows"]) -> Shaped[Tensor, "chunks"]:
        """Sum a value of each row over the rows of each chunk; places beyond the last chunk are 0."""
        return _sums(values, self.chunks, self.size)

    def over_their_chunks(self, values: Shaped[Tensor, "their_rows"]) -> Shaped[Tensor, "chunks"]:
        """Sum a value of each of the teacher's rows over the rows of each chunk."""
        return _sums(values, self.their_chunks, self.size)

    def chunk_weights(self) -> Float[Tensor, "chunks"] | None:
        """Return as how many chunks each counts: the weight of its sequence; None where all count alike."""
        weights = self.rows.weights
        return None if weights is None else of_chunks(weights, self.chunks, self.size)

    def starts(self) -> tuple[Int[Tensor, "chunks"], Int[Tensor, "chunks"]]:
        """Return, of each chunk, the student's and the teacher's row that predicts its first token.

        There, both have read the same text, and say what follows. Waits for the device.
        """
        count = int(self.chunks.max()) + 1 if len(self.chunks) else 0
        return _first(self.chunks, count), _first(self.their_chunks, count)

    def ends(self) -> tuple[Int[Tensor, "chunks"], Int[Tensor, "chunks"]]:
        """Return, of each chunk, the student's and the teacher's row that predicts its last token."""
        count = int(self.chunks.max()) + 1 if len(self.chunks) else 0
        return _last(self.chunks, count), _last(self.their_chunks, count)

    def lengths(self) -> tuple[Int[Tensor, "chunks"], Int[Tensor, "chunks"]]:
        """Return how many tokens of the student and of the teacher each chunk has; 0 beyond the last one."""
        ours, theirs = (torch.ones_like(c) for c in (self.chunks, self.their_chunks))
        return self.over_chunks(ours), self.over_their_chunks(theirs)


def _sums(values: Tensor, chunks: Tensor, size: int) -> Tensor:
    places = chunks.where(chunks >= 0, size)
    return values.new_zeros(size + 1).index_add(0, places, values)[:size]


def of_chunks(values: Shaped[Tensor, "tokens"], chunks: Int[Tensor, "tokens"], size: int) -> Shaped[Tensor, "chunks"]:
    """Return what all tokens of a chunk have in common, of each chunk; 0 where there is none."""
    return values.new_zeros(size + 1).scatter(0, chunks.where(chunks >= 0, size), values)[:size]


def count_chunks(batch: Batch, of: Int[Tensor, "some"] | None = None) -> Tensor:
    """Return how many chunks a batch has, or how many `of` names, by their weights."""
    chunks, weights = batch["chunks"].flatten(), weights_of(batch)
    if weights is None:
        return chunks.max() + 1 if of is None else torch.tensor(len(of), device=chunks.device)
    each = of_chunks(weights.flatten(), chunks, int(chunks.max()) + 1)
    return (each if of is None else each[of]).sum(dtype=torch.float64)


def _first(chunks: Tensor, count: int) -> Tensor:
    rows = torch.arange(len(chunks), device=chunks.device)
    first = rows.new_full((count + 1,), len(chunks))
    return first.scatter_reduce(0, chunks.where(chunks >= 0, count), rows, "amin")[:count]


def _last(chunks: Tensor, count: int) -> Tensor:
    return len(chunks) - 1 - _first(chunks.flip(0), count)


class AlignedMethod(TokenMethod):
    """Base of the methods across tokenizers: `match` compares what both say; cross-entropy is the student's own.

    Each optimiser step draws whose text it takes, as `GKD` does: the student's own with probability `student_share`,
    which the teacher reads with its own tokenizer, else the data's. The student's own losses (cross-entropy) are on the
    data's text alone: its own text would teach it what it does already.

    Evaluation adds what can be compared across tokenizers: the bits per byte that student and teacher need for the
    text.

    Args:
        losses: of the student alone.
        student_share: share of optimiser steps on the student's own text, 0 to 1.
        others: as of `TokenMethod`.
    """

    signals: frozenset[type] = frozenset({Hidden, Dense})
    """What the teacher may answer with."""
    weighs = True

    def __init__(self, losses=(), *, student_share: float = 0.0, **options: Any):
        super().__init__(losses, **options)
        self.student_share = student_share
        if wrong := [name for name, loss in self.token_losses.items() if loss.needs_teacher]:
            raise ValueError(
                f"losses: {', '.join(wrong)} compares token by token, which needs one tokenizer; "
                f"{type(self).__name__} takes losses of the student alone, such as cross_entropy"
            )

    @property
    def needs(self) -> frozenset[str]:
        share = self.student_share
        text = {"labels"} if share < 1 else set()
        return frozenset({"teacher", "alignment"} | text | ({"rollouts"} if share > 0 else set()))

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "student" if draw < self.student_share else "data"

    def introduce(self, ours: Spelling, theirs: Spelling) -> None:
        """Hear what the tokens of both tokenizers spell: called once, by the trainer, before anything is compared."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count trained tokens of either reading, chunks, and bytes of text."""
        theirs: Any = batch["theirs"]
        return {
            "tokens": count_kept(batch["labels"], weights_of(batch)),
            "their_tokens": count_kept(theirs["labels"], weights_of(theirs)),
            "chunks": count_chunks(batch),
            "bytes": over_sequences(batch["bytes"], batch),
        }

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Return the terms, and what to log, of one micro-batch."""
        raise NotImplementedError

    def read(self, nets: Nets, batch: Batch) -> Readings:
        """Ask both networks about their own reading of the batch."""
        theirs: Any = batch["theirs"]
        rows = kept_rows(batch["labels"], weights_of(batch))
        their_rows = kept_rows(theirs["labels"], weights_of(theirs))
        teacher = nets["teacher"](theirs, their_rows)
        return Readings(
            rows,
            nets["student"](batch, rows),
            rows.of_labels(batch["chunks"]),
            their_rows,
            teacher,
            their_rows.of_labels(theirs["chunks"]),
        )

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        readings = self.read(nets, batch)
        terms = self.match(readings, nets, batch, step)
        if not self.token_losses or "sampled" in batch:
            return terms
        own = self.compare(readings.student, None, readings.rows, step)
        return Terms(terms.terms | own.terms, terms.metrics | own.metrics)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and the bits per byte of both."""
        readings = self.read(nets, batch)
        terms = self.match(readings, nets, batch, step)
        nats = -readings.rows.sum(self.token_log_probs(readings))
        metrics = {"cross_entropy": (nats, "tokens"), "bits_per_byte": (nats / math.log(2), "bytes")}
        if not isinstance(readings.teacher, TopK | Sampled):  # else not all of its text is known
            theirs = -readings.their_rows.sum(self.teacher_log_probs(readings)) / math.log(2)
            metrics["teacher_bits_per_byte"] = (theirs, "bytes")
        return Terms(terms.terms, terms.metrics | metrics)

    def token_log_probs(self, readings: Readings) -> Float[Tensor, "rows"]:
        """Return the student's log-probability of each of its tokens."""
        return token_log_probs(readings.student, readings.rows.labels, chunk_rows=self.chunk_rows, impl=self.impl)[0]

    @torch.no_grad()
    def teacher_log_probs(self, readings: Readings) -> Float[Tensor, "their_rows"]:
        """Return the teacher's log-probability of each of its own tokens; -inf where a `TopK` does not say.

        Raises ValueError for a signal of tokens that are not the text's.
        """
        teacher, labels = readings.teacher, readings.their_rows.labels
        if isinstance(teacher, TopK):
            return label_log_probs(teacher, labels)
        return teacher_log_probs(teacher, labels, chunk_rows=self.chunk_rows, impl=self.impl)


def parted(losses: Sequence[Loss], who: str) -> tuple[list[Loss], dict[str, Loss]]:
    """Return the losses of the student alone, and by name those that compare it with the teacher.

    Raises ValueError, naming the method `who`, where none compares.
    """
    compared = [loss for loss in losses if loss.needs_teacher]
    if not compared:
        raise ValueError(f"losses: {who} needs one that compares with the teacher, as forward_kl")
    own = [loss for loss in losses if not loss.needs_teacher]
    return own, dict(zip(numbered_names(compared), compared, strict=True))


class AlignedOptions(TokenOptions):
    """What can be asked of any method across tokenizers."""

    method: ClassVar[type[AlignedMethod]]
    student_share: float = Field(0.0, ge=0, le=1)
    """Share of optimiser steps that train on the student's own text, read by the teacher with its own tokenizer; the
    others take the data's."""
