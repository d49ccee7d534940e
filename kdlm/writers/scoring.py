"""Scoring: what a model gives each token of a text that it did not have to write (teacher forcing)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from kdlm.losses import token_log_probs
from kdlm.models import Predictor, evaluating
from kdlm.signal import Dense, Hidden, Rows
from kdlm.writers.writer import Prompt, Refused


@dataclass(frozen=True)
class Scored:
    """A completion under a model: its text alone, without a token that ends it.

    Attributes:
        log_probs: of each token, nats, at temperature 1 over the whole vocabulary.
        offsets: the character of the completion at which each token begins. By these the same sentence is found in
            another tokenizer.
    """

    log_probs: list[float]
    offsets: list[int]


@runtime_checkable
class Scorer(Protocol):
    """A writer that also scores what others wrote."""

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> Iterator[tuple[int, Scored | Refused]]:
        """Yield what became of each prompt and completion, with its place, as soon as it is known."""
        ...


@dataclass(frozen=True)
class Tokens:
    """A prompt and its completion as token ids: `ids[border:]` are the completion's, which begin at `offsets`."""

    ids: list[int]
    border: int
    offsets: list[int]


def tokenised(tokenizer: Any, leading: Sequence[int], prompt: str, completion: str) -> Tokens:
    """Return a pair as the model reads it after the prompt: tokenised together, or apart where a token would go over
    their border (as training data is, see `kdlm.data.encoding`).
    """
    asked = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, starts, before = whole["input_ids"], [start for start, _ in whole["offset_mapping"]], len(prompt)
    if ids[: len(asked)] != asked:
        alone = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [*(0 for _ in asked), *(start for start, _ in alone["offset_mapping"])]
        ids, before = [*asked, *alone["input_ids"]], 0
    offsets = [max(0, start - before) for start in starts[len(asked) :]]
    return Tokens([*leading, *ids], len(leading) + len(asked), offsets)


class LocalScorer:
    """Scores with a model of this machine; its logits are never all in memory.

    Args:
        context: most tokens that the model reads.
        batch_tokens: tokens read together, padding among them.
    """

    def __init__(self, model: Any, context: int, batch_tokens: int):
        self.model, self.context, self.batch_tokens = model, context, batch_tokens
        self.predict = Predictor(model)

    def score(self, pairs: Sequence[Tokens]) -> Iterator[tuple[int, Scored | Refused]]:
        """Yield what became of each pair; long ones first, so that little is padded."""
        readable = []
        for place, pair in enumerate(pairs):
            if len(pair.ids) > self.context:
                yield place, Refused(f"{len(pair.ids)} tokens, and the model reads {self.context}")
            elif not pair.offsets:
                yield place, Scored([], [])
            elif not pair.border:
                yield place, Refused("no token before the completion: nothing predicts its first one")
            else:
                readable.append(place)
        for batch in self.batches(readable, pairs):
            values = self._values([pairs[place] for place in batch])
            for place, log_probs in zip(batch, values, strict=True):
                yield place, Scored(log_probs, pairs[place].offsets)

    def batches(self, places: Sequence[int], pairs: Sequence[Tokens]) -> Iterator[list[int]]:
        """Yield the places of pairs that are read together; long ones first, so that little is padded."""
        left = sorted(places, key=lambda place: -len(pairs[place].ids))
        while left:
            size = max(1, self.batch_tokens // len(pairs[left[0]].ids))
            batch, left = left[:size], left[size:]
            yield batch

    @torch.no_grad()
    def _values(self, pairs: Sequence[Tokens]) -> list[list[float]]:
        signal, rows = self.read(pairs)
        log_probs, _ = token_log_probs(signal, rows.labels)
        return [part.tolist() for part in log_probs.float().cpu().split([len(pair.offsets) for pair in pairs])]

    @torch.no_grad()
    def read(self, pairs: Sequence[Tokens]) -> tuple[Hidden | Dense, Rows]:
        """Return what the model says where it predicts a token of a completion, and these places, pair by pair."""
        length, home = max(len(pair.ids) for pair in pairs), self.model.device
        ids = torch.tensor([[*pair.ids, *[0] * (length - len(pair.ids))] for pair in pairs])
        mask = torch.tensor([[1] * len(pair.ids) + [0] * (length - len(pair.ids)) for pair in pairs])
        places = [n * length + t - 1 for n, pair in enumerate(pairs) for t in range(pair.border, len(pair.ids))]
        labels = [token for pair in pairs for token in pair.ids[pair.border :]]
        rows = Rows(torch.tensor(places, device=home), torch.tensor(labels, device=home))
        with evaluating(self.model):
            return self.predict({"input_ids": ids.to(home), "attention_mask": mask.to(home)}, rows), rows
