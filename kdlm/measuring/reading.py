"""Reader: every measure of every kept token of a batch, from one forward pass of each model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdlm.losses import all_measures_for, kept_rows, teacher_log_probs, weighted_sum
from kdlm.models import Predictor, view
from kdlm.signal import Dense, Hidden, LogProbs, Mixture, Rows, Signal, TopK, sequence_of, take
from kdlm.spelling import Spelling, spelling_of
from kdlm.teachers import freeze

Batch = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What was measured of the kept tokens of a batch.

    Attributes:
        rows: the kept positions.
        values: each measure of each of them, in float64, on the CPU; `bytes` that its token spells.
        sequences: which sequence of the batch each is in.
        theirs: of a teacher with a tokenizer of its own, the same for its tokens: `their_nats`, `their_bytes`.
        their_sequences: which sequence each of those is in.
        signals: what student and teacher said.
    """

    rows: Rows
    values: dict[str, Float[Tensor, "rows"]]
    sequences: Int[Tensor, "rows"]
    signals: tuple[Hidden | Dense, Signal | None]
    theirs: dict[str, Float[Tensor, "their_rows"]] = field(default_factory=dict)
    their_sequences: Int[Tensor, "their_rows"] | None = None

    def only(self, wanted: Bool[Tensor, "rows"]) -> "Reading":
        """Return what was measured of some of the tokens."""
        index = wanted.nonzero().squeeze(-1)
        here = index.cpu()
        return replace(
            self,
            rows=Rows(self.rows.index[index], self.rows.labels[index]),
            values={name: value[here] for name, value in self.values.items()},
            sequences=self.sequences[here],
            signals=(take(self.signals[0], index), self.signals[1] and take(self.signals[1], index)),
        )


class Reader:
    """Reads batches with a student and whatever it is compared with.

    Args:
        student: a language model, or its `Predictor`.
        teacher: a `kdlm.teachers.Teacher`, a model, which is frozen, or None.
        start: the model that the student was before, for `kl_to_start` and `start_cross_entropy`.
        baseline: another student, for `baseline_cross_entropy`.
        names: the measures; by default all that the teacher can give.
        vocab: ids that student and teacher share; by default those of the smaller head.
        tokenizer: the student's, for `bytes`; None leaves them out.
        their_tokenizer: the teacher's, where batches hold two readings of the text.
        options: `chunk_rows` and `impl` of `weighted_sum`.

    Raises ValueError where the student is no language model.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        *,
        start: Any = None,
        baseline: Any = None,
        names: Sequence[str] | None = None,
        vocab: Any = None,
        tokenizer: Any = None,
        their_tokenizer: Any = None,
        **options: Any,
    ):
        self.student = predictor(student, "student")
        self.teacher = freeze(teacher) if isinstance(teacher, nn.Module) else teacher
        self.others = {
            name: predictor(model, name)
            for name, model in (("start", start), ("baseline", baseline))
            if model is not None
        }
        self.names = None if names is None else tuple(names)
        self.vocab, self.options = vocab, options
        self.spelling = spelling_of(tokenizer) if tokenizer is not None else None
        self.their_spelling = spelling_of(their_tokenizer) if their_tokenizer is not None else None
        self.notes: list[str] = []
        """What could not be measured, and why."""

    @property
    def modules(self) -> list[nn.Module]:
        """The models that are run here and have a mode to be put in."""
        return [one.module for one in (self.student, *self.others.values())]

    @property
    def device(self) -> torch.device:
        return next(self.student.module.parameters()).device

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Reading:
        """Return everything about one batch, which must be on the student's device."""
        rows = kept_rows(batch["labels"])
        student, teacher = self.student(batch, rows), None
        theirs, their_sequences = {}, None
        if self.teacher is not None and "chunks" in batch:
            theirs, their_sequences = self._their_reading(batch["theirs"])
        elif self.teacher is not None:
            teacher = self.teacher(batch, rows)
        values = self._compared(student, teacher, rows) | self._beside(student, batch, rows)
        values = {name: value.double().cpu() for name, value in values.items()}
        if self.spelling is not None:
            values["bytes"] = spelt(self.spelling, rows.labels)
        sequences = rows.select(sequence_of(batch)).cpu()
        return Reading(rows, values, sequences, (student, teacher), theirs, their_sequences)

    def _compared(self, student: Hidden | Dense, teacher: Signal | None, rows: Rows) -> dict[str, Tensor]:
        signal = teacher if isinstance(teacher, Dense | Hidden | Mixture | TopK) else None
        possible = all_measures_for(None if signal is None else type(signal))
        if isinstance(signal, TopK) and signal.ids.shape[-1] < 5:
            possible = tuple(name for name in possible if name != "top5_agreement")
            self.note(f"top5_agreement: the teacher gives {signal.ids.shape[-1]} tokens at each place")
        names = possible if self.names is None else tuple(self.names)
        if self.teacher is not None and signal is None:
            names = tuple(name for name in names if name in possible or name not in all_measures_for(Dense))
        vocab = self.vocab
        if vocab is None and isinstance(signal, Dense | Hidden) and signal.vocab_size != student.vocab_size:
            vocab = min(signal.vocab_size, student.vocab_size)
        values = weighted_sum([], student, signal, rows.labels, vocab=vocab, measures=names, **self.options)[1]
        if isinstance(teacher, LogProbs):
            values["teacher_cross_entropy"] = -teacher.log_probs
        elif teacher is not None and signal is None:
            self.note(f"a {type(teacher).__name__} signal is no distribution: nothing is compared with the teacher")
        return values

    def _beside(self, student: Hidden | Dense, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        """Return how far the student is from its start, and the losses of the other models."""
        values = {}
        for name, model in self.others.items():
            signal = model(batch, rows)
            wanted = ["kl_to_teacher", "teacher_cross_entropy"] if name == "start" else ["teacher_cross_entropy"]
            ids = min(student.vocab_size, signal.vocab_size)
            vocab = None if student.vocab_size == signal.vocab_size else ids
            found = weighted_sum([], student, signal, rows.labels, vocab=vocab, measures=wanted, **self.options)[1]
            if name == "start":
                values["kl_to_start"] = found["kl_to_teacher"]
            values[f"{name}_cross_entropy"] = found["teacher_cross_entropy"]
        return values

    def _their_reading(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return what a teacher with its own tokenizer gives its own tokens of the text."""
        rows = kept_rows(batch["labels"])
        self.note("the teacher has its own tokenizer: bits per byte can be compared, distributions over tokens cannot")
        sequences = rows.select(sequence_of(batch)).cpu()
        try:
            log_p = teacher_log_probs(self.teacher(batch, rows), rows.labels, **self.options)
        except ValueError as error:
            self.note(f"teacher_bits_per_byte: {error}")
            return {}, sequences
        values = {"their_nats": -log_p.double().cpu()}
        if self.their_spelling is not None:
            values["their_bytes"] = spelt(self.their_spelling, rows.labels)
        return values, sequences

    def note(self, line: str) -> None:
        """Say once why something is not there."""
        if line not in self.notes:
            self.notes.append(line)


def predictor(model: Any, name: str) -> Predictor:
    """Return what reads a language model. Raises ValueError for any other."""
    seen = view(model) if isinstance(model, nn.Module) else model
    if not isinstance(seen, Predictor):
        raise ValueError(f"{name}: expected a language model, got {type(model).__name__}")
    return seen


def spelt(spelling: Spelling, ids: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """Return how many bytes of text each token spells; 0 for control tokens and ids that the tokenizer lacks."""
    lengths = np.append(spelling.lengths, 0)
    places = np.minimum(ids.cpu().numpy(), len(lengths) - 1)
    return torch.from_numpy(lengths[places].astype(np.float64))
