"""Rounds: one generation of completions and the optimiser steps that train on it.

A round takes the rows of `every` optimiser steps from the loader, completes their prompts at once, and serves those
steps `reuse` times over. With `asynchronous` the next round is completed while this one is trained on. Text that waits
is saved in checkpoints, so that a resumed run trains on what the unbroken one would have.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from kdlm.rollouts.engine import Completion, Engine, Sampling
from kdlm.rollouts.episodes import Episodes
from kdlm.rollouts.rows import Opaque, Row, Written, prompt_of
from kdlm.rollouts.sections import RolloutSection

logger = logging.getLogger(__name__)

USED = (
    *("input_ids", "labels", "index", "domain", "weight", "reference", "asked"),
    *("context", "contexts", "bad_context"),
    *("chunks", "their_ids", "their_labels", "their_chunks", "their_closing"),  # where there are two readings
)
"""What rollouts use of a row."""

Text = Literal["data", "student", "both"]
Finish = Callable[[list[tuple[Row, list[int], Completion]]], list[Written]]


@dataclass
class Slot:
    """What one optimiser step trains on, on this rank.

    Attributes:
        micro: the data's rows, by micro-batch.
        text: whose text it trains on.
        written: the student's completions of each micro-batch's prompts, in their order; empty where it is the data's.
    """

    micro: list[list[Row]]
    text: Text
    written: list[list[Written]] = field(default_factory=list)


@dataclass
class _Round:
    """The slots of a generation, how often they are served, and what gives the completions that fill them."""

    slots: list[Slot]
    passes: int
    pending: Callable[[], list[list[Written]]]

    def settle(self) -> None:
        """Wait for the completions and give each slot its own."""
        drawn = iter(self.pending())
        for slot in self.slots:
            if slot.text != "data" and not slot.written:
                slot.written = [[one for _ in rows for one in next(drawn)] for rows in slot.micro]

    def tell(self, told: Callable[[list[Written]], list[Written]]) -> list[Written]:
        """Add to the completions what a teacher is told about them, and return them all."""
        done = told([one for slot in self.slots for rows in slot.written for one in rows])
        each = iter(done)
        for slot in self.slots:
            slot.written = [[next(each) for _ in rows] for rows in slot.written]
        return done


class Rounds:
    """Hands out optimiser steps' rows with the student's completions.

    Args:
        engine: what completes prompts.
        section: how, how many at once, and how often each is trained on.
        seed: of this rank; each generation draws its own from it.
        text: optimiser step -> whose text it trains on; the same on every rank.
        student: gives the model whose weights the engine takes.
        finish: makes of completions what is trained on: their text and reward.
        last: gives the number of optimiser steps of the run.
        told: adds to what was written what a teacher is told about it. It is asked when a round begins to be trained
            on, so that what it knows by then does not depend on when the completions were drawn, nor on checkpoints.
        trained_on: is shown a round's completions right after that.
        episodes: completes prompts turn by turn; without it a completion is one turn.
        informed: row -> the prompt that the engine completes in place of the row's own, after which the completion is
            trained on; None where that is the row's own. Evaluation does without.

    Raises ValueError where the section asks for what the engine cannot do.
    """

    def __init__(
        self,
        engine: Engine,
        section: RolloutSection,
        *,
        seed: int,
        text: Callable[[int], Text],
        student: Callable[[], Any],
        finish: Finish,
        last: Callable[[], int],
        told: Callable[[list[Written]], list[Written]] = list,
        trained_on: Callable[[list[Written]], None] = lambda written: None,
        episodes: Episodes | None = None,
        informed: Callable[[Row], list[int] | None] | None = None,
    ):
        if section.asynchronous and engine.lives:
            raise ValueError("rollouts.asynchronous: this engine reads the very weights that are being trained")
        self.engine, self.section, self.seed = engine, section, seed
        self.text, self.student, self.finish, self.last = text, student, finish, last
        self.told, self.trained_on, self.episodes, self.informed = told, trained_on, episodes, informed
        self.waited = 0.0
        """Seconds that steps have waited for completions."""
        self._pool = ThreadPoolExecutor(1, "kdlm-rollouts")
        self._source: Iterator[Any] | None = None
        self._steps: deque[Slot] = deque()
        self._next: _Round | None = None
        self._behind = 0

    def step(self, batches: Iterator[Opaque], micro: int, index: int) -> Slot | None:
        """Return what optimiser step `index` trains on, `micro` batches of the loader; None when it has no more."""
        if batches is not self._source:
            self._source = batches
            for _ in range(self._behind * micro):  # a resumed loader stands where the waiting text began
                next(batches, None)
            self._behind = 0
        if not self._steps:
            current = self._next or self._begin(batches, micro, index, index)
            if current is None:
                return None
            began = time.perf_counter()
            current.settle()
            self.waited += time.perf_counter() - began
            self.trained_on(current.tell(self.told))
            ahead = index + len(current.slots) * current.passes
            self._next = self._begin(batches, micro, ahead, index) if self.section.asynchronous else None
            self._steps.extend(slot for _ in range(current.passes) for slot in current.slots)
        return self._steps.popleft()

    def complete(self, rows: Sequence[Row], version: int, *, samples: int | None = None) -> list[Written]:
        """Complete the prompts of some rows now, with the weights of now: for evaluation."""
        sampling = self.section.sampling
        if samples is not None:
            sampling = sampling.model_copy(update={"samples_per_prompt": samples})
        if self._next is not None:  # the engine is at work on it
            self._next.settle()
        self.engine.take(self.student(), version)
        prompts = [prompt_of(row, self.section.prompt_tokens) for row in rows]
        return self.told(self._write(rows, prompts, prompts, sampling, self.seed))

    def _write(
        self, rows: Sequence[Row], prompts: list[list[int]], read: list[list[int]], sampling: Sampling, seed: int
    ) -> list[Written]:
        """Complete what is `read`, and give it as completions of the prompts."""
        if self.episodes is not None:
            written = self.episodes(self.engine, rows, read, sampling, seed)
            return [replace(one, prompt=prompts[one.completion.group]) for one in written]
        drawn = self.engine.generate(read, sampling, seed)
        return self.finish([(rows[one.group], prompts[one.group], one) for one in drawn])

    def _begin(self, batches: Iterator[Opaque], micro: int, index: int, version: int) -> _Round | None:
        """Take the rows of a round that begins at step `index` from the loader, and start completing their prompts."""
        slots = []
        for place in range(min(self.section.every, max(1, self.last() - index)) if index < self.last() else 0):
            rows = [[plain(row) for row in batch] for batch in _some(batches, micro)]
            if not rows:
                break
            slots.append(Slot(rows, self.text(index + place)))
        if not slots:
            return None
        for _ in range(self.section.reuse - 1):  # the loader repeats the rows of a round, see Repeated
            _some(batches, micro * len(slots))
        asked = [row for slot in slots if slot.text != "data" for rows in slot.micro for row in rows]
        prompts = [prompt_of(row, self.section.prompt_tokens) for row in asked]
        if prompts:
            self.engine.take(self.student(), version)
        read = prompts
        if self.informed is not None:
            read = [self.informed(row) or prompt for row, prompt in zip(asked, prompts, strict=True)]
        seed = random.Random(f"{self.seed} {index}").getrandbits(62)

        def written() -> list[list[Written]]:
            if not prompts:
                return []
            done = self._write(asked, prompts, read, self.section.sampling, seed)
            by_prompt: list[list[Written]] = [[] for _ in prompts]
            for one in done:
                by_prompt[one.completion.group].append(one)
            return by_prompt

        pending = self._pool.submit(written).result if self.section.asynchronous else written
        return _Round(slots, self.section.reuse, pending)

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """Return the text that waits to be trained on, as plain values; what could not be made is left out."""
        waiting = {"steps": [asdict(slot) for slot in self._steps], "next": None}
        if self._next is not None:
            try:
                self._next.settle()
            except Exception as error:  # the step that wants it raises it; this checkpoint makes it anew
                logger.warning("no completions to save: %s", error)
            else:
                waiting["next"] = [asdict(slot) for slot in self._next.slots]
        return waiting

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; the loader then stands where that text began."""
        self._steps = deque(_slot(slot) for slot in state["steps"])
        self._behind = len(self._steps)
        if state["next"] is not None:
            self._next = _Round([_slot(slot) for slot in state["next"]], self.section.reuse, list)
            self._behind += len(self._next.slots) * self._next.passes

    def close(self) -> None:
        """Drop what waits, and close the engine when it is done with what it does."""
        self._pool.shutdown(cancel_futures=True)
        self.engine.close()


class Repeated(Sampler[int]):
    """Repeats each run of `size` indices of a sampler `times` times; a last run that is not whole is left out.

    Args:
        sampler: what is repeated.
        size: rows of one round, over all ranks.
        times: passes over them.
    """

    def __init__(self, sampler: Sampler[int], size: int, times: int):
        self.sampler, self.size, self.times = sampler, size, times
        if len(sampler) < size:  # pyright: ignore[reportArgumentType]  the samplers that are handed in have a length
            raise ValueError(
                f"rollouts.reuse: one round takes {size} rows and the training data hold {len(sampler)}: "  # pyright: ignore[reportArgumentType]
                "use fewer micro-batches or a smaller rollouts.every"
            )

    def __iter__(self) -> Iterator[int]:
        run: list[int] = []
        for index in self.sampler:
            run.append(index)
            if len(run) == self.size:
                yield from run * self.times
                run = []

    def __len__(self) -> int:
        return len(self.sampler) // self.size * self.size * self.times  # pyright: ignore[reportArgumentType]


def plain(row: Row) -> Row:
    """Return what rollouts use of a row, as values that can be written down."""
    kept = {key: row[key] for key in USED if key in row}
    return {key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value for key, value in kept.items()}


def _some(batches: Iterator[Opaque], count: int) -> list[list[Row]]:
    taken = []
    for _ in range(count):
        batch = next(batches, None)
        if batch is None:
            break
        taken.append(batch.rows)
    return taken


def _slot(saved: dict[str, Any]) -> Slot:
    def written(one: dict[str, Any]) -> Written:
        return Written(**{**one, "completion": Completion(**one["completion"])})

    return Slot(saved["micro"], saved["text"], [[written(one) for one in rows] for rows in saved["written"]])
