"""Token losses between models of different vocabularies, over what both can say of the next token."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from kdlm.data.paired_vocabulary import PairedVocabulary
from kdlm.losses import Matched, OnOutcomes, Projected, Turned, weighted_sum
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings, parted
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, Mixture, TopK, take
from kdlm.spelling import Spelling


class OutcomesKD(AlignedMethod):
    """Base: the recipe's token losses at the start of every chunk, where both have read the same text.

    Inside a chunk the two have read different texts and are not compared.

    Args:
        losses: those that compare with the teacher, over the outcomes that the subclass makes; the others are of the
            student alone, at all of its tokens.
    """

    signals = frozenset({Hidden, Dense, Mixture, TopK})

    def __init__(self, losses=(), **options: Any):
        own, self.compared = parted(losses, type(self).__name__)
        super().__init__(own, **options)
        self.outcomes: Matched | Turned | None = None

    def introduce(self, ours: Spelling, theirs: Spelling) -> None:
        self.paired, self.outcomes = PairedVocabulary(ours, theirs), None
        if not len(self.paired.matched[0]):
            raise ValueError("student and teacher share no token: use alm or uld, which need none")

    def make_outcomes(self, vocab: int, their_vocab: int) -> Matched | Turned:
        """Return what is compared of so many tokens."""
        raise NotImplementedError

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        if self.outcomes is None:
            self.outcomes = self.make_outcomes(*self.paired.tokens(readings.student, readings.teacher))
        self.outcomes = self.outcomes.to(readings.rows.index.device)
        starts, their_starts = readings.starts()
        rows = readings.rows.take(starts)
        total, parts = weighted_sum(
            [
                (name, OnOutcomes(loss, self.outcomes), loss.weight_at(step.progress, step.index))
                for name, loss in self.compared.items()
            ],
            take(readings.student, starts),
            take(readings.teacher, their_starts),
            rows.labels,
            chunk_rows=self.chunk_rows,
            impl=self.impl,
        )
        metrics = {name: (rows.sum(value), "chunks") for name, value in parts.items()}
        return Terms({"outcomes": Term(rows.sum(total), "chunks")}, metrics)


class SharedVocabularyKD(OutcomesKD):
    """Plain distillation on the tokens that both vocabularies have, at the positions where both have read the same.

    Args:
        losses: any token loss, such as forward_kl or jsd.
        rest: `bucket` compares the mass of all other tokens as one outcome, where both sides have such tokens;
            `renormalise` leaves it out. A teacher that gives top-k has it always.
    """

    paper = "arXiv 1503.02531, over shared tokens"

    def __init__(self, losses=(), *, rest: Literal["bucket", "renormalise"] = "bucket", **options: Any):
        super().__init__(losses, **options)
        self.rest = rest
        if rest == "renormalise":
            self.signals = self.signals - {TopK}  # what a top-k has of the shared tokens is not known in all

    def make_outcomes(self, vocab: int, their_vocab: int) -> Matched:
        ids, their_ids = map(torch.from_numpy, self.paired.matched)
        return Matched.of(ids, their_ids, vocab, their_vocab, rest=self.rest == "bucket")


class SharedVocabularyKDSection(AlignedOptions):
    """The recipe's token losses on the tokens that both tokenizers have, wherever both have read the same text."""

    method: ClassVar = SharedVocabularyKD
    name: Literal["shared_vocabulary_kd"] = "shared_vocabulary_kd"
    rest: Literal["bucket", "renormalise"] = "bucket"
    """`bucket`: the mass of all other tokens is one outcome more; `renormalise`: it is left out on both sides."""


class VocabularyProjection(OutcomesKD):
    """One side's probabilities carried to the other's vocabulary by a sparse matrix (NeMo-RL, X-token).

    Which matrix: `PairedVocabulary.projection`. NeMo-RL makes it of token strings, weighs the pieces of a token by
    0.9 * 0.1^i and compares averages over the tokens of a chunk; here it is made of bytes, a row is what the teacher
    may say first, and it is used where both have read the same text.

    Args:
        losses: any token loss; forward_kl in NeMo-RL.
        onto: whose vocabulary: the `teacher`'s, as by default in NeMo-RL, or the `student`'s. The side with the longer
            tokens should be carried: what a long token says determines the short one that begins it, not the reverse.
        k: tokens to which one of the side that is carried leads at most.
    """

    paper = "NeMo-RL, X-token"

    def __init__(self, losses=(), *, onto: Literal["teacher", "student"] = "teacher", k: int = 4, **options: Any):
        super().__init__(losses, **options)
        self.onto, self.k = onto, k
        if onto == "student":
            self.signals = self.signals - {TopK}

    def make_outcomes(self, vocab: int, their_vocab: int) -> Matched | Turned:
        if self.onto == "teacher":
            return Projected.by(*map(torch.from_numpy, self.paired.projection(self.k)), vocab, their_vocab)
        entries = PairedVocabulary(self.paired.theirs, self.paired.ours).projection(self.k)
        return Turned(Projected.by(*map(torch.from_numpy, entries), their_vocab, vocab))


class VocabularyProjectionSection(AlignedOptions):
    """The recipe's token losses after one side's probabilities are projected to the other's vocabulary."""

    method: ClassVar = VocabularyProjection
    name: Literal["vocabulary_projection"] = "vocabulary_projection"
    onto: Literal["teacher", "student"] = "teacher"
    """Whose vocabulary; `student` where its tokens are the shorter ones, bytes above all. It takes whole logits."""
    k: int = Field(4, ge=1)
    """Tokens to which one of the other side leads at most; what is beyond goes to the sink."""
