"""ULD: the sorted probabilities of student and teacher, whatever their tokens are called."""

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from kdlm.losses import kept_rows, sorted_l1
from kdlm.losses.sweep import sweep
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, Mixture, Rows, TopK, sequence_of, take, weights_of

Pairs = tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]


class ULD(AlignedMethod):
    """L1 distance between sorted probabilities at paired positions (universal logit distillation, arXiv 2402.12030).

    Args:
        losses: of the student alone; the paper has cross-entropy beside it.
        pairing: `index`, as in the paper: the i-th token of an answer with the i-th of the teacher's, up to the end of
            the shorter one, which drifts apart with the first word that is split differently; or `chunks`: where both
            have read the same text, and only there.
        top_k: compare the k most probable tokens and the mass of the rest; None sorts whole vocabularies. A teacher
            that gives top-k does so by itself.
        temperature: divides the logits of both.
        weight: of this loss in the sum. 1.5 is from memory of the paper, unverified.
    """

    paper = "arXiv 2402.12030"
    signals = frozenset({Hidden, Dense, Mixture, TopK})

    def __init__(
        self,
        losses=(),
        *,
        pairing: Literal["index", "chunks"] = "index",
        top_k: int | None = None,
        temperature: float = 1.0,
        weight: float = 1.5,
        **options,
    ):
        super().__init__(losses, **options)
        self.pairing, self.weight = pairing, weight
        self.distance = partial(sorted_l1, temperature=temperature, top_k=top_k)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs of positions too."""
        counts = super().counts(batch)
        if self.pairing == "chunks":
            return counts | {"pairs": counts["chunks"]}
        theirs: Any = batch["theirs"]
        rows = kept_rows(batch["labels"], weights_of(batch))
        pairs, _ = by_index(rows, batch, kept_rows(theirs["labels"]), theirs)
        return counts | {"pairs": rows.take(pairs).sum(torch.ones_like(pairs))}

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        theirs: Any = batch["theirs"]
        pairs = starts = readings.starts()
        if self.pairing == "index":
            pairs = by_index(readings.rows, batch, readings.their_rows, theirs)
        student, teacher = take(readings.student, pairs[0]), take(readings.teacher, pairs[1])
        options = {"vocab": None, "chunk_rows": self.chunk_rows, "impl": self.impl}
        rows = readings.rows.take(pairs[0])
        value = rows.sum(sweep(self.distance, student, teacher, **options))
        aligned = rows.sum(_aligned(readings, starts, pairs))
        metrics = {"uld": (value.detach(), "pairs"), "aligned": (aligned, "pairs")}
        return Terms({"uld": Term(value, "pairs", self.weight)}, metrics)


def by_index(rows: Rows, batch: Batch, their_rows: Rows, theirs: Batch) -> Pairs:
    """Pair the rows of both readings by their place in the answer, each answer cut to the shorter reading of it.

    Answers of a sequence (turns of a chat) are paired in order. Waits for the device.
    """
    keys, their_keys = _places(rows, batch), _places(their_rows, theirs)
    if not len(keys) or not len(their_keys):
        return keys[:0], their_keys[:0]
    found = torch.searchsorted(their_keys, keys).clamp(max=len(their_keys) - 1)
    ours = (their_keys[found] == keys).nonzero()[:, 0]
    return ours, found[ours]


def _places(rows: Rows, batch: Batch) -> Int[Tensor, "rows"]:
    """Return one rising number of each row for its sequence, the answer in it and the place in that answer."""
    begins = torch.ones_like(rows.index, dtype=torch.bool)
    begins[1:] = rows.index.diff() != 1
    first = begins.nonzero()[:, 0]
    answer = begins.cumsum(0) - 1
    sequence = rows.select(sequence_of(batch))
    of_answers = sequence[first]
    within = torch.arange(len(first), device=first.device) - torch.searchsorted(of_answers, of_answers)
    place = torch.arange(len(answer), device=first.device) - first[answer]
    return (sequence << 42) + (within[answer] << 21) + place


def _aligned(
    readings: Readings, starts: tuple[Int[Tensor, "chunks"], Int[Tensor, "chunks"]], pairs: Pairs
) -> Bool[Tensor, "pairs"]:
    """Return in which pairs both have read the same text."""
    numbers = []
    for chunks, start, pair in zip((readings.chunks, readings.their_chunks), starts, pairs, strict=True):
        numbers.append(torch.full_like(chunks, -1).scatter(0, start, chunks[start])[pair])
    return (numbers[0] >= 0) & (numbers[0] == numbers[1])


class ULDSection(AlignedOptions):
    """Match sorted probabilities: needs nothing of the two vocabularies, and knows nothing of them."""

    method: ClassVar = ULD
    name: Literal["uld"] = "uld"
    pairing: Literal["index", "chunks"] = "index"
    """Which positions are compared: `index`, the i-th tokens of an answer, or `chunks`, where both read the same."""
    top_k: int | None = Field(None, ge=1)
    """Compare the k most probable tokens and the mass of the rest; by default whole vocabularies are sorted."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both; must be 1 where the teacher gives top-k."""
    weight: float = Field(1.5, ge=0)
    """Factor of this loss beside the recipe's own losses."""
