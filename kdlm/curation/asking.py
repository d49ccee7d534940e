"""Asking: has a writer give the completions that a memory lacks."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kdlm.curation.memory import Memory
from kdlm.curation.step import Counts, digest
from kdlm.rollouts import Sampling
from kdlm.sandbox.progress import console
from kdlm.writers import Answered, Asked, Prices, Prompt, Refused, Writer

DIGITS = 6
"""Decimal places of a log-probability that are kept."""


@dataclass(frozen=True)
class Request:
    """Completions number `first` to `first + count - 1` of a prompt, by the hash of what is asked."""

    key: str
    first: int
    count: int = 1

    @property
    def slots(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass
class Bill:
    """What answers took and cost, and when that is enough."""

    prices: Prices | None = None
    budget: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    under_way: int = 0

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Take in an answer."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    @property
    def cost(self) -> float:
        """What all answers cost so far."""
        return 0.0 if self.prices is None else self.prices.of(self.prompt_tokens, self.completion_tokens)

    @property
    def spent(self) -> bool:
        """Whether another request, as dear as the others so far, would go beyond the budget."""
        return self.budget is not None and self.cost * (1 + (self.under_way + 1) / max(1, self.requests)) > self.budget


class Asking:
    """The completions of one sampling: those in memory, and once they were asked for the others.

    Args:
        memory: of exactly this writer, sampling and seed.
        seed: of the pipeline.
    """

    def __init__(self, memory: Memory, sampling: Sampling, *, log_probs: bool, seed: int, bill: Bill, counts: Counts):
        self.memory, self.sampling, self.log_probs, self.seed = memory, sampling, log_probs, seed
        self.bill, self.counts = bill, counts
        self.refused: set[str] = set()

    def ask(self, asked: Mapping[str, Prompt], writer: Writer, stage: str) -> None:
        """Ask for what is missing, and again for what answers leave out, until an answer brings nothing new.

        Ends early where the bill is spent.
        """
        known = -1
        while (missing := self.missing(asked)) and len(self.memory) > known and not self.bill.spent:
            known = len(self.memory)
            with console(f"{stage}: {missing} of {len(asked) * self.wanted} completions", missing) as advance:
                began, before = time.monotonic(), self.bill.completion_tokens
                for request, answer in self._answers(asked, writer):
                    new = self._keep(request, answer)
                    pace = (self.bill.completion_tokens - before) / max(1e-9, time.monotonic() - began)
                    cost = f", {self.bill.cost:.2f} spent" if self.bill.prices is not None else ""
                    advance(new, f"{pace:,.0f} tokens/s{cost}")
        if missing and not self.bill.spent:
            self.counts.note("no completion in the answer", f"{missing} of them, asked for again in vain", missing)

    @property
    def wanted(self) -> int:
        return self.sampling.samples_per_prompt

    def lacks(self, key: str, slot: int) -> bool:
        """Tell whether a completion is to be asked for."""
        return (name := name_of(key, slot)) not in self.memory and name not in self.refused

    def missing(self, asked: Iterable[str]) -> int:
        """Return how many completions are to be asked for."""
        return sum(self.lacks(key, slot) for key in asked for slot in range(self.wanted))

    def _answers(self, asked: Mapping[str, Prompt], writer: Writer) -> Iterator[tuple[Request, Answered | Refused]]:
        sent: dict[int, Request] = {}

        def taken() -> Iterator[Asked]:
            for place, request in enumerate(self._requests(asked, writer)):
                if self.bill.spent:
                    return
                sent[place] = request
                self.bill.under_way += 1
                sampling = self.sampling.model_copy(update={"samples_per_prompt": request.count})
                seed = seed_of(self.seed, request, self.sampling)
                yield Asked(asked[request.key], sampling, seed, self.log_probs)

        try:
            for place, answer in writer.write(taken()):
                self.bill.under_way -= 1
                yield sent.pop(place), answer
        finally:
            self.bill.under_way = 0

    def _requests(self, asked: Iterable[str], writer: Writer) -> Iterator[Request]:
        """Yield what is to be asked. What is drawn in batches is asked in the same ones whatever of them is known."""
        if writer.at_once > 1:
            everything = (Request(key, slot) for key in asked for slot in range(self.wanted))
            while batch := list(islice(everything, writer.at_once)):
                if any(self.lacks(one.key, one.first) for one in batch):
                    yield from batch
            return
        for key in asked:
            slots = [slot for slot in range(self.wanted) if self.lacks(key, slot)]
            while slots:
                count = 1
                while count < min(writer.choices, len(slots)) and slots[count] == slots[0] + count:
                    count += 1
                yield Request(key, slots[0], count)
                slots = slots[count:]

    def _keep(self, request: Request, answer: Answered | Refused) -> int:
        """Take an answer in; return how many completions are settled by it."""
        before = [slot for slot in request.slots if self.lacks(request.key, slot)]
        lost = [answer] * request.count if isinstance(answer, Refused) else list(answer.lost)
        texts = [] if isinstance(answer, Refused) else answer.texts[: request.count]
        lines: dict[str, dict[str, Any]] = {}
        for slot, text in zip(request.slots, texts, strict=False):
            logs = None if text.log_probs is None else [round(value, DIGITS) for value in text.log_probs]
            used = [answer.prompt_tokens, answer.written] if isinstance(answer, Answered) and not lines else [0, 0]
            asked = seed_of(self.seed, request, self.sampling)
            seed = asked if isinstance(answer, Refused) or answer.seed is None else answer.seed
            said = {"text": text.text, "stop": text.stop, "tokens": text.tokens, "log_probs": logs}
            lines[name_of(request.key, slot)] = {**said, "seed": seed, "used": used}
        if new := {name: line for name, line in lines.items() if name not in self.memory}:
            self.memory.add(new)
        if isinstance(answer, Answered):
            self.bill.add(answer.prompt_tokens, answer.written)
        for slot, refused in zip(request.slots[len(texts) :], lost, strict=False):
            self.refused.add(name_of(request.key, slot))
            self.counts.note(refused.kind, f"{request.key} completion {slot}: {refused.reason}")
        return sum(not self.lacks(request.key, slot) for slot in before)


def name_of(key: str, slot: int) -> str:
    """Return what a completion is known by in a memory."""
    return f"{key}-{slot}"


def seed_of(seed: int, request: Request, sampling: Sampling) -> int:
    """Return the seed of a request: of the pipeline's, what is asked, the number of the completion, and the sampling,
    so that the entries of a sweep do not draw alike."""
    return int(digest([seed, request.key, request.first, drawn_by(sampling)])[:12], 16)


def drawn_by(sampling: Sampling) -> dict[str, Any]:
    """Return what a single completion is drawn by."""
    return sampling.model_dump(mode="json", exclude={"samples_per_prompt", "teacher_share"})
