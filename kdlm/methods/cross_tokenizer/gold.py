"""GOLD: groups of tokens merged into one distribution on either side, and compared."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from kdlm.data.paired_vocabulary import PairedVocabulary
from kdlm.losses import Hybrid, Matched, merged_divergence, token_log_probs
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings, count_chunks
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.signal import Dense, Hidden, Rows, take
from kdlm.spelling import Spelling


class GOLD(AlignedMethod):
    """General on-policy logit distillation (Hugging Face, October 2025; TRL's GOLDTrainer), on chunks of bytes.

    Where ours differs from TRL's: tokens are matched by their bytes, not by strings; `observed` reads the distribution
    that predicts a token, where TRL's reads the one after it; matched masses are completed to a distribution (see
    `kdlm.losses.merged.Hybrid`); the mean is over all chunks of the step, not of each sequence and then of those. Its
    defaults are temperature 0.9 and half of the steps on the student's own text; here 1 and none.

    Args:
        losses: of the student alone.
        merge: of a chunk of several tokens: `observed` takes the distribution at the first one, times the
            probabilities of the text's later tokens; `bayesian` that at the last one, times those of the earlier.
        hybrid: compare the tokens that both have by generalised JSD and the rest by sorted L1; without it, sorted L1
            of all (ULD).
        beta: of the generalised JSD.
        temperature: divides the logits of both.
        weights: of the JSD and of the L1; by default the share of the teacher's tokens that the student has too, and
            the complement.
        skip_eos: leave out the chunks of no bytes, which end a turn or a text.
    """

    paper = "Hugging Face, October 2025"

    def __init__(
        self,
        losses=(),
        *,
        merge: Literal["observed", "bayesian"] = "observed",
        hybrid: bool = True,
        beta: float = 0.5,
        temperature: float = 1.0,
        weights: tuple[float, float] | None = None,
        skip_eos: bool = True,
        **options: Any,
    ):
        super().__init__(losses, **options)
        self.merge, self.hybrid, self.beta, self.temperature = merge, hybrid, beta, temperature
        self.weights, self.skip_eos = weights, skip_eos
        self.control = torch.empty(0, dtype=torch.long)
        self.compare_rows: Hybrid | None = None

    def introduce(self, ours: Spelling, theirs: Spelling) -> None:
        self.paired, self.compare_rows = PairedVocabulary(ours, theirs), None
        self.control = torch.tensor(sorted(ours.control), dtype=torch.long)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count the groups that are compared too."""
        counts = super().counts(batch)
        skipped = count_chunks(batch, self._skipped(batch["chunks"], batch["input_ids"]))
        return counts | {"groups": counts["chunks"] - skipped}

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        at, their_at = readings.starts() if self.merge == "observed" else readings.ends()
        if not isinstance(readings.teacher, Hidden | Dense):
            given = type(readings.teacher).__name__
            raise ValueError(
                f"gold takes one teacher's logits, got a {given} signal; average an ensemble in space: log"
            )
        ours = self._others(readings.student, readings.rows, readings.chunks, at)
        with torch.no_grad():
            theirs = self._others(readings.teacher, readings.their_rows, readings.their_chunks, their_at)
        kept = torch.ones_like(at, dtype=torch.bool)
        kept[self._skipped(readings.chunks, readings.rows.labels)] = False
        at, their_at, ours, theirs = at[kept], their_at[kept], ours[kept], theirs[kept]
        value, parts = merged_divergence(
            take(readings.student, at),
            take(readings.teacher, their_at),
            ours,
            theirs,
            self._hybrid(readings.student, readings.teacher),
            chunk_rows=self.chunk_rows,
            impl=self.impl,
        )
        sums = {"gold": value.detach(), **parts}
        rows = readings.rows.take(at)
        metrics = {name: (rows.sum(x), "groups") for name, x in sums.items()}
        return Terms({"gold": Term(rows.sum(value), "groups")}, metrics)

    def _skipped(self, chunks: Int[Tensor, "*tokens"], ids: Int[Tensor, "*tokens"]) -> Int[Tensor, "skipped"]:
        """Return the numbers of the chunks that are left out, given the chunk of each token."""
        control = self.control if self.skip_eos else self.control[:0]
        return chunks[(chunks >= 0) & torch.isin(ids, control.to(ids.device))].unique()

    def _others(
        self, signal: Hidden | Dense, rows: Rows, chunks: Int[Tensor, "rows"], at: Int[Tensor, "chunks"]
    ) -> Float[Tensor, "chunks"]:
        """Return the log-probability of each chunk's tokens except the one at its row `at`."""
        rest = chunks >= 0
        rest[at] = False
        where = rest.nonzero()[:, 0]
        found = token_log_probs(
            take(signal, where),
            rows.labels[where],
            temperature=self.temperature,
            chunk_rows=self.chunk_rows,
            impl=self.impl,
        )[0]
        return found.new_zeros(len(at)).index_add(0, chunks[where], found)

    def _hybrid(self, student: Hidden | Dense, teacher: Hidden | Dense) -> Hybrid:
        """Return what compares two merged rows, on the device of the student's."""
        if self.compare_rows is None:
            ids, their_ids = map(torch.from_numpy, self.paired.matched)
            if not self.hybrid:
                ids, their_ids = ids[:0], their_ids[:0]
            matched = Matched.of(ids, their_ids, *self.paired.tokens(student, teacher), rest=True)
            share = self.paired.share if self.hybrid else 0.0
            weights = (share, 1 - share) if self.weights is None else self.weights
            source = student.hidden if isinstance(student, Hidden) else student.logits
            self.compare_rows = Hybrid(matched.to(source.device), *weights, self.beta, self.temperature)
        return self.compare_rows


class GOLDSection(AlignedOptions):
    """Merge the tokens of each chunk into one distribution on either side: shared tokens by JSD, the rest sorted."""

    method: ClassVar = GOLD
    name: Literal["gold"] = "gold"
    merge: Literal["observed", "bayesian"] = "observed"
    """Whose distribution stands for a chunk of several tokens: the first one's, or the last one's."""
    hybrid: bool = True
    """JSD on the tokens that both have and sorted L1 on the rest; false: sorted L1 of all (ULD)."""
    beta: float = Field(0.5, ge=0, le=1)
    """Of the generalised JSD, in GKD's sense: 0 is forward KL, 1 reverse KL."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both; without a factor T^2."""
    weights: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """Of the JSD and the sorted L1; by default the share of the teacher's tokens that the student has, and the rest."""
    skip_eos: bool = True
    """Leave out the tokens that end a turn or a text."""
