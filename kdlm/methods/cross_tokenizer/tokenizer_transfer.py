"""Tokenizer transfer: a model with a new tokenizer learns from itself with the old one, in words and in thought."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt
from torch import Tensor

from kdlm.losses import kept_rows
from kdlm.methods.cross_tokenizer.aligned import Readings
from kdlm.methods.cross_tokenizer.alm import ALM, ALMSection
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, weights_of


def state_distance(
    student: Float[Tensor, "positions width"], teacher: Float[Tensor, "positions width"]
) -> Float[Tensor, "positions"]:
    """Return `|s - t|^2 / |t|^2` of each position: 0 where they agree, 1 for a student's state of zeros.

    The released code of arXiv 2503.20083 divides each channel by its mean square over the batch, which would make the
    gradient depend on how a batch is split.
    """
    student, teacher = student.float(), teacher.detach().float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)


@dataclass(frozen=True)
class LayeredReadings(Readings):
    """Readings with the outputs of decoder layers, pair by pair, at either's rows."""

    layers: list[tuple[Tensor, Tensor]]


class TokenizerTransfer(ALM):
    """ALM, and hidden states that agree wherever both have read the same text (arXiv 2503.20083).

    The state that has read a chunk is that of its last token: the row that predicts the first token of the next chunk.
    So what the paper matches at the ends of chunks is here at `Readings.starts()`; the end of a sequence, from where
    nothing is predicted, is left out.

    Args:
        losses: of the student alone; the paper has cross-entropy too.
        hidden_weight: of the mean distance over chunks and layers.
        layers: (student layer, teacher layer) pairs, 0 is the first decoder layer; None: the last hidden states, after
            the final norm, which the heads read.
    """

    signals = frozenset({Hidden})

    def __init__(self, losses=(), *, hidden_weight: float = 1.0, layers=None, **options: Any):
        super().__init__(losses, **options)
        self.hidden_weight, self.layers = hidden_weight, layers

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"teacher.layers"} if self.layers else set())

    def read(self, nets: Nets, batch: Batch) -> Readings:
        if not self.layers:
            return super().read(nets, batch)
        theirs: Any = batch["theirs"]
        rows = kept_rows(batch["labels"], weights_of(batch))
        their_rows = kept_rows(theirs["labels"], weights_of(theirs))
        ours, others = zip(*self.layers, strict=True)
        for who, wanted in (("student", ours), ("teacher", others)):
            if max(wanted) >= nets[who].num_layers:
                raise ValueError(f"method.layers: the {who} has {nets[who].num_layers} layers, and no {max(wanted)}")
        teacher, targets = nets["teacher"].with_layers(theirs, their_rows, others)
        student, hidden = nets["student"].with_layers(batch, rows, ours)
        chunks, their_chunks = rows.of_labels(batch["chunks"]), their_rows.of_labels(theirs["chunks"])
        pairs = list(zip(hidden, targets, strict=True))
        return LayeredReadings(rows, student, chunks, their_rows, teacher, their_chunks, pairs)

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        found = super().match(readings, nets, batch, step)
        starts, their_starts = readings.starts()
        distances = [
            state_distance(ours.index_select(0, starts), theirs.index_select(0, their_starts))
            for ours, theirs in self._states(readings)
        ]
        value = readings.rows.take(starts).sum(torch.stack(distances).mean(0))
        term = {"hidden": Term(value, "chunks", self.hidden_weight)}
        return Terms(found.terms | term, found.metrics | {"hidden": (value.detach(), "chunks")})

    def _states(self, readings: Readings) -> list[tuple[Tensor, Tensor]]:
        """Return the states to compare, pair by pair. Raises ValueError where two are not alike."""
        if isinstance(readings, LayeredReadings):
            pairs = readings.layers
        else:
            student, teacher = readings.student, readings.teacher
            if isinstance(student, Dense) or not isinstance(teacher, Hidden):
                raise ValueError("tokenizer_transfer compares hidden states, which student or teacher does not give")
            pairs = [(student.hidden, teacher.hidden)]
        for ours, theirs in pairs:
            if ours.shape[-1] != theirs.shape[-1]:
                raise ValueError(
                    f"tokenizer_transfer compares a model with itself: the student's states have {ours.shape[-1]} "
                    f"channels, the teacher's {theirs.shape[-1]}; use method alm"
                )
        return pairs


class TokenizerTransferSection(ALMSection):
    """Give a model another tokenizer: it is its own teacher, by the likelihood of chunks and by hidden states."""

    method: ClassVar = TokenizerTransfer
    name: Literal["tokenizer_transfer"] = "tokenizer_transfer"  # pyright: ignore[reportIncompatibleVariableOverride]
    hidden_weight: float = Field(1.0, ge=0)
    """Weight of the distance between hidden states where both have read the same text."""
    layers: list[tuple[NonNegativeInt, NonNegativeInt]] | None = Field(None, min_length=1)
    """[student layer, teacher layer] pairs, counted from 0; by default the last hidden states, after the final norm.
    Where the new tokens are smaller, the student's first layers have to put them together: map later ones of the
    student to earlier ones of the teacher."""
