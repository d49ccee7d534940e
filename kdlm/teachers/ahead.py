"""A teacher that answers all micro-batches of an optimiser step in one turn, before the student's.

So it can read as many sequences at once as suits it, whatever the student's micro-batch is, and its weights need to be
on the device in its turn only. What a step asks is taken to be what the last one asked; where that is wrong, or a batch
was not announced, the answer is made when it is asked for, and is the same.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from kdlm.models import Ask, Inside, joined
from kdlm.models.prediction import head
from kdlm.signal import Dense, Head, Hidden, Rows, take
from kdlm.teachers.local import LocalTeacher, check_length, own_reading
from kdlm.teachers.placement import Shelf
from kdlm.teachers.regrouping import Reading, dealt, regrouped, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a reading.

    Attributes:
        index: positions of its rows, which ascend.
        signal: at these rows.
        layers: the outputs of decoder layers there.
    """

    index: Int[Tensor, "rows"]
    signal: Hidden | Dense
    layers: dict[int, Tensor]

    def at(self, index: Int[Tensor, "n"], layers: Sequence[int]) -> "Answer | None":
        """Return the answer at some of its rows; None where it is of others, or of other layers."""
        if not self.layers.keys() >= set(layers):
            return None
        if len(self.index) == len(index) and not (self.index != index).any():
            return self
        if not len(self.index):
            return None
        place = torch.searchsorted(self.index, index).clamp(max=len(self.index) - 1)
        if (self.index[place] != index).any():
            return None
        hidden = {layer: self.layers[layer].index_select(0, place) for layer in layers}
        return Answer(index, take(self.signal, place), hidden)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a batch: which layers, and whether of `every` token of the text or of the announced rows."""

    layers: frozenset[int] = frozenset()
    every: bool = False

    def __or__(self, other: "Wanted") -> "Wanted":
        return Wanted(self.layers | other.layers, self.every or other.every)


class AheadTeacher(LocalTeacher):
    """A `LocalTeacher` whose turn comes once in a step: `answer_ahead`.

    Its answers are those of a `LocalTeacher`, bit for bit without `batch_size`, and up to rounding with it.

    Args:
        sliced: keep the weights in the host's memory, and on the device only while it answers; the head stays there,
            since the losses read it in the student's turn.
        batch_size: sequences it reads at once; None: as many as are asked about at once.
        options: as of a `LocalTeacher`. A teacher in shards reads as often on every rank as on the one that has most
            to read, and answers anew on all of them where one is asked what was not foreseen.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        signal: Literal["auto", "hidden", "dense"] = "auto",
        *,
        sliced: bool = False,
        batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__(model, signal, **options)
        self.sliced, self.batch_size = sliced, batch_size
        self.shelf: Shelf | None = None
        """Where the weights of a sliced teacher rest, once it knows its device."""
        self.turns = 0
        """How often its weights were brought to the device, or would have been."""
        self._here = False
        self._gathered: Head | None = None  # of a teacher in shards, as long as its turn
        self._announced: list[Reading] = []
        self.made: list[Answer] = []
        """What was answered ahead, of each micro-batch of the step."""
        self._wanted: Wanted | None = Wanted()  # of the step that is answered; None: nothing
        self._asked: Wanted | None = None  # of the announced batches, since they were
        self._surprised = False

    def to(self, device: torch.device) -> "AheadTeacher":
        """Move the model, or say where it is to be in its turns."""
        if not self.sliced:
            super().to(device)
        elif self.shelf is None or self.shelf.device != device:
            stays = head(self.model) if self.signals == {Hidden} else None
            self.shelf = Shelf(self.model, device, () if stays is None else (stays.weight, stays.bias))
        return self

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Keep the weights on the device: where one question follows another, as in evaluation."""
        if self._here:
            yield
            return
        self.turns, self._here = self.turns + 1, True
        if self.shelf is not None:
            self.shelf.fetch()
        try:
            yield
        finally:
            self._here, self._gathered = False, None
            if self.shelf is not None:
                self.shelf.put_back()

    def answer_ahead(self, asked: Sequence[tuple[Batch, Rows]]) -> None:
        """Answer what a step will ask about its micro-batches; the last step's answers are dropped.

        Args:
            asked: every micro-batch, on the student's device, with the rows that losses are taken at.
        """
        self.made = []  # before the turn: they are not held beside the new ones
        if self._announced:
            self._wanted, self._asked = self._asked, None
        self._announced = [_ascending(self._reading(batch, rows)) for batch, rows in asked]
        if self._announced and self._wanted is not None:
            self.made = self._all(self._announced, self._wanted)

    @torch.no_grad()
    def with_layers(self, batch: Batch, rows: Rows, layers: Sequence[int]) -> tuple[Hidden | Dense, list[Tensor]]:
        """Return the signal and the outputs of decoder layers `layers` at the kept rows."""
        reading = self._reading(batch, rows)
        number = self._number_of(reading)
        known = not self._most(number is None)
        answer = self._foreseen(number, reading.index, layers) if known and number is not None else None
        if answer is None:
            answer = self._all([_ascending(reading)], Wanted(frozenset(layers)))[0].at(reading.index, layers)
            assert answer is not None
        return answer.signal, [answer.layers[layer] for layer in layers]

    @torch.no_grad()
    def inside(
        self, batch: Batch, rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Hidden | Dense | None, Inside]:
        """Return what a `LocalTeacher` does, made when it is asked for: of the inside nothing is foreseen."""
        with self.at_hand():
            if self.batch_size is None:
                return super().inside(batch, rows, ask, predicted)
            asked = [self._reading(batch, one) for one in (rows, predicted) if one is not None]
            sorts = [one.index.unique(return_inverse=True) for one in asked]
            parts = split(asked[0].inputs, [index for index, _ in sorts], self.batch_size)
            others = self._most(len(parts)) - len(parts)
            found = []
            for inputs, places in [*parts, *[parts[-1]] * others]:
                own, *heard = (Rows(index, index) for index in places)
                found.append(super().inside(inputs, own, ask, *heard))
            signals, insides = zip(*found[: len(parts)], strict=True)
            signal = None if predicted is None else take(_one(signals), sorts[1][1])
            return signal, joined(insides).each(lambda one: one.index_select(0, sorts[0][1]))

    def _whole(self, head: Head) -> Head:
        """Return the head with all of its weights, gathered once in a turn, however many times it reads."""
        if self._gathered is None:
            self._gathered = super()._whole(head)
        return self._gathered

    # What was announced

    def _reading(self, batch: Batch, rows: Rows) -> Reading:
        """Return what the model reads of a batch."""
        if "theirs" in batch:
            check_length(batch, self.model)
            batch, rows = own_reading(batch, rows)
        return Reading({key: value for key, value in batch.items() if key in self._predict.inputs}, rows.index)

    def _number_of(self, reading: Reading) -> int | None:
        """Return which of the announced batches this is; None where it is another text."""
        for same in (_is, torch.equal):  # a device need not be waited for where the tensors are the same ones
            for number, one in enumerate(self._announced):
                if one.inputs.keys() == reading.inputs.keys() and all(
                    same(value, reading.inputs[key]) for key, value in one.inputs.items()
                ):
                    return number
        return None

    def _foreseen(self, number: int, index: Int[Tensor, "rows"], layers: Sequence[int]) -> Answer | None:
        """Return the answer that was made ahead, or is now, for all batches of the step: others will be asked alike.

        None where even what was asked of every token does not have it.
        """
        asked, answers = Wanted(frozenset(layers)), self.made
        found = answers[number].at(index, layers) if answers else None
        if self._most(found is None):
            known = not answers or answers[number].at(index, ()) is not None
            wanted = (self._wanted or Wanted()) | replace(asked, every=not known)
            if self._most(found is None and bool(answers) and wanted == self._wanted):
                return None
            if answers and not self._surprised:
                self._surprised = True
                logger.info("the teacher was asked what it had not foreseen: it answers the step's batches once more")
            answers = self.made = []  # not held beside the new ones
            self._wanted, self.made = wanted, self._all(self._announced, wanted)
            found = self.made[number].at(index, layers)
        every = self._wanted is not None and self._wanted.every
        self._asked = (self._asked or Wanted()) | replace(asked, every=every)
        return found

    # Its turn

    @torch.no_grad()
    def _all(self, readings: Sequence[Reading], wanted: Wanted) -> list[Answer]:
        """Answer several readings, so many sequences at a time as it reads."""
        if wanted.every:
            readings = [replace(one, index=_every(one)) for one in readings]
        parts = readings if self.batch_size is None else regrouped(readings, self.batch_size)
        layers = sorted(wanted.layers)
        with self.at_hand():
            others = self._most(len(parts)) - len(parts)  # agreed on before the first: shards are gathered in each
            answers = [self._answer(part, layers) for part in [*parts, *[parts[-1]] * others]][: len(parts)]
        return answers if self.batch_size is None else _dealt(answers, readings)

    def _most(self, value: int) -> int:
        """Return the greatest value of all ranks where they hold a teacher in shards, and so answer together."""
        if self.computes_on is None:
            return value
        greatest = torch.tensor(int(value), device=self.computes_on)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        return int(greatest)

    def _answer(self, reading: Reading, layers: list[int]) -> Answer:
        rows = Rows(reading.index, reading.index)
        signal, inside = super().inside(reading.inputs, rows, Ask(layers=layers), rows)  # of a size already
        assert signal is not None
        return Answer(reading.index, signal, dict(zip(layers, inside.hidden, strict=True)))


def _is(a: object, b: object) -> bool:
    return a is b


def _ascending(reading: Reading) -> Reading:
    return replace(reading, index=reading.index.unique())


def _every(reading: Reading) -> Int[Tensor, "positions"]:
    real = reading.inputs.get("attention_mask", torch.ones_like(reading.inputs["input_ids"]))
    return real.flatten().nonzero().squeeze(-1)


def _one(signals: Sequence[Hidden | Dense]) -> Hidden | Dense:
    """Return the rows of several signals, one behind the other."""
    first = signals[0]
    if isinstance(first, Hidden):
        return Hidden(torch.cat([one.hidden for one in signals if isinstance(one, Hidden)]), first.head)
    return Dense(torch.cat([one.logits for one in signals if isinstance(one, Dense)]))


def _dealt(answers: Sequence[Answer], readings: Sequence[Reading]) -> list[Answer]:
    """Return the answers to readings from those to the same rows, in their order, of other readings."""
    counts = [len(one.index) for one in readings]
    first = answers[0].signal
    if isinstance(first, Hidden):
        parts = dealt([one.signal.hidden for one in answers if isinstance(one.signal, Hidden)], counts)
        signals: list[Hidden | Dense] = [Hidden(hidden, first.head) for hidden in parts]
    else:
        parts = dealt([one.signal.logits for one in answers if isinstance(one.signal, Dense)], counts)
        signals = [Dense(logits) for logits in parts]
    layers = {layer: dealt([one.layers[layer] for one in answers], counts) for layer in answers[0].layers}
    return [
        Answer(reading.index, signals[number], {layer: hidden[number] for layer, hidden in layers.items()})
        for number, reading in enumerate(readings)
    ]
