"""Approximate likelihood matching: student and teacher should find each chunk of text equally likely."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from kdlm.losses import ChunkDivergence, chunk_kl, chunk_likelihood
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings
from kdlm.methods.cross_tokenizer.debiasing import merged, word_starts
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, LogProbs, Mixture, TopK, summed
from kdlm.spelling import Spelling


class ALM(AlignedMethod):
    """A divergence between the probabilities that both give each chunk of text (arXiv 2503.20083).

    All that it asks of the teacher is what its text's own tokens got, so that a capture of one number a token will do,
    or a server that scores a text. Of a `TopK` teacher only the chunks count whose every token is among the k. That is
    a choice of chunks by what the teacher finds likely: of text that it finds unlikely the student learns nothing from
    it, and too high a probability there stays. Cross-entropy beside it, or a teacher asked for the text's own tokens,
    does not have this bias; `left_out` says how much there is of it.

    A chunk that is left out counts as one without a loss: the mean is over all chunks, or all of the teacher's tokens.

    With `debias` chunks end where a word may end only, and that one does is part of them (`debiasing.py`): as the
    paper's code has it, threshold 0.1, except that a chunk made of several weighs as many. The first version of the
    paper has threshold 1e-4, on a statistic of pairs of tokens that is not here. The code also balances the gradients
    of its losses by their norms, where `chunk_likelihood` is scaled so that weights near 1 balance.

    Args:
        losses: of the student alone, such as cross-entropy.
        temperature: tau, which divides the log-probability of a chunk.
        divergence: see `chunk_likelihood`.
        max_tokens: a chunk with more tokens than this on both sides is left out; None takes all.
        debias: merge chunks behind which the teacher finds the beginning of a word no likelier than this; needs a
            teacher of whole distributions. None compares every chunk as it is.
        per: the mean is over chunks, or over the teacher's tokens, each chunk weighing as many as it has.
    """

    paper = "arXiv 2503.20083"
    signals = frozenset({Hidden, Dense, Mixture, LogProbs, TopK})

    def __init__(
        self,
        losses=(),
        *,
        temperature: float = 100.0,
        divergence: ChunkDivergence = "binary_ce",
        max_tokens: int | None = None,
        debias: float | None = None,
        per: Literal["chunk", "token"] = "chunk",
        **options,
    ):
        super().__init__(losses, **options)
        self.temperature, self.max_tokens, self.per = temperature, max_tokens, per
        self.divergence: ChunkDivergence = divergence
        self.debias, self._starts = debias, None
        if debias is not None:
            self.signals = frozenset({Hidden, Dense})

    def introduce(self, ours: Spelling, theirs: Spelling) -> None:
        if self.debias is not None:  # a pass over both vocabularies
            self._starts = word_starts(ours), word_starts(theirs)

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        size, ends, their_ends = 1, 0.0, 0.0
        if self.debias is not None:
            assert self._starts is not None, "the trainer introduces the tokenizers"
            whole = merged(readings, *self._starts, self.debias, chunk_rows=self.chunk_rows, impl=self.impl)
            readings, size, ends, their_ends = whole.readings, whole.size, whole.student, whole.teacher
        student = readings.over_chunks(self.token_log_probs(readings)) + ends
        teacher = readings.over_their_chunks(self.teacher_log_probs(readings)) + their_ends
        lengths, their_lengths = readings.lengths()
        there = lengths > 0
        chosen = there & teacher.isfinite() & self._short(lengths, their_lengths)
        teacher = torch.where(chosen, teacher, student.detach())  # finite, whatever it was
        weight, counted = chosen * (their_lengths if self.per == "token" else size), readings.chunk_weights()
        value = chunk_likelihood(student, teacher, self.temperature, self.divergence)
        total, unit = summed(value * weight, counted), "their_tokens" if self.per == "token" else "chunks"
        return Terms(
            {"alm": Term(total, unit)},
            {
                "alm": (total.detach(), unit),
                "chunk_kl": (summed(chunk_kl(student, teacher, self.temperature) * weight, counted), unit),
                "in_chunks": (summed(lengths, counted), "tokens"),
                "tokens_per_chunk": (summed(lengths, counted), "chunks"),
                "left_out": (summed((there & ~chosen) * size, counted), "chunks"),
            },
        )

    def _short(self, lengths: Tensor, their_lengths: Tensor) -> Bool[Tensor, "chunks"] | Literal[True]:
        """Return which chunks are not too long: by the side that needs fewer tokens, since bytes are always many."""
        return True if self.max_tokens is None else torch.minimum(lengths, their_lengths) <= self.max_tokens


class ALMSection(AlignedOptions):
    """Match the likelihood of chunks of text, which any two tokenizers share."""

    method: ClassVar = ALM
    name: Literal["alm"] = "alm"
    temperature: float = Field(100.0, gt=0)
    """tau, which divides a chunk's log-probability: long chunks have hardly any probability without it."""
    divergence: ChunkDivergence = "binary_ce"
    """Between the two probabilities of a chunk: `binary_ce` (the paper's), `reverse_kl`, or of their logarithms
    `absolute` and `k2`, half the square."""
    max_tokens: int | None = Field(None, ge=1)
    """Leave out chunks with more tokens than this on both sides: long stretches where no boundary is shared."""
    debias: float | None = Field(None, ge=0, le=1)
    """Merge chunks behind which the teacher finds the beginning of a word no likelier than this (0.1 in the paper's
    code), and let a chunk's probability be that a word begins behind it too. Needs a teacher of whole distributions."""
    per: Literal["chunk", "token"] = "chunk"
    """What the mean is over: chunks, or the teacher's tokens, each chunk weighing as many as it has."""
