"""Approximate likelihood matching: student and teacher should find each chunk of text equally likely."""

from typing import ClassVar, Literal

from pydantic import Field

from kdlm.losses import chunk_likelihood
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, LogProbs


class ALM(AlignedMethod):
    """Binary cross-entropy between the probabilities of each chunk of text (arXiv 2503.20083).

    Args:
        losses: of the student alone, such as cross-entropy.
        temperature: tau, which divides the log-probability of a chunk.
    """

    paper = "arXiv 2503.20083"
    signals = frozenset({Hidden, Dense, LogProbs})

    def __init__(self, losses=(), *, temperature: float = 100.0, **options):
        super().__init__(losses, **options)
        self.temperature = temperature

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        student = readings.over_chunks(self.token_log_probs(readings))
        teacher = readings.over_their_chunks(self.teacher_log_probs(readings))
        chosen = (readings.lengths()[0] > 0).to(student)
        value = (chosen * chunk_likelihood(student, teacher, self.temperature)).sum()
        return Terms({"alm": Term(value, "chunks")}, {"alm": (value.detach(), "chunks")})


class ALMSection(AlignedOptions):
    """Match the likelihood of chunks of text, which any two tokenizers share."""

    method: ClassVar = ALM
    name: Literal["alm"] = "alm"
    temperature: float = Field(100.0, gt=0)
    """tau, which divides a chunk's log-probability: long chunks have hardly any probability without it."""
