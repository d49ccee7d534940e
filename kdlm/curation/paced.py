"""The step `paced`: rows are weighed by how often the student solves their prompt (PACED)."""

from collections import Counter
from math import exp, lgamma, perm
from typing import Any, Literal

from datasets import Dataset
from pydantic import Field, model_validator

from kdlm.curation.rows import with_columns
from kdlm.curation.step import Desk, Step, lacks
from kdlm.rollouts import PassRate


def expected_weight(rate: PassRate, a: float = 1.0, b: float = 1.0, prior: float | None = None) -> float | None:
    """Return what is known of `p^a (1 - p)^b` of a prompt whose pass rate p was seen in few attempts.

    With a prior Beta(c, c) of p it is the posterior mean, for s successes and f failures

        B(s + c + a, f + c + b) / B(s + c, f + c),

    positive for every prompt, and comparable between prompts of unequal numbers of attempts. The plain
    `p^ (1 - p^)` is too small by the factor (K - 1) / K, another one for each K. Without a prior it is the unbiased
    estimate, for whole a and b: `s (s-1) ... f (f-1) ... / (K (K-1) ...)` with a, b and a + b factors, which for
    a = b = 1 is `K / (K - 1) p^ (1 - p^)`; None where there are fewer than a + b attempts.
    """
    solved, failed = rate.solved, rate.attempts - rate.solved
    if prior is not None:
        return exp(_log_beta(solved + prior + a, failed + prior + b) - _log_beta(solved + prior, failed + prior))
    ways = perm(rate.attempts, int(a + b))
    return perm(solved, int(a)) * perm(failed, int(b)) / ways if ways else None


def _log_beta(x: float, y: float) -> float:
    return lgamma(x) + lgamma(y) - lgamma(x + y)


class Paced(Step):
    """Weighs every row by `p^a (1 - p)^b`, p the student's pass rate at its prompt (PACED, arXiv 2603.11178).

    At p near 0 the gradient is noise, at p near 1 nothing is left to learn; the largest weight is at a / (a + b). Reads
    `solved` and `attempts`, which `verify` counts over a student's completions (what was cut as its `truncated` says),
    and adds `weight`. A pass rate is of the student that was asked: one that has learned since wants it counted anew.

    From the paper's abstract and the authors' read-me; their code for the weights was not found. The correction for few
    attempts and the prior are ours.
    """

    name: Literal["paced"] = "paced"
    a: float = Field(1.0, ge=0)
    """Power of the pass rate: a larger one leaves out what the student cannot do yet."""
    b: float = Field(1.0, ge=0)
    """Power of the failure rate: a larger one leaves out what it can do."""
    prior: float | None = Field(None, gt=0)
    """`null` is the unbiased estimate, which is 0 for prompts that were solved never or always; a and b are whole
    numbers then. A number is c of a prior Beta(c, c) of the pass rate, which keeps these alive; larger ones trust few
    attempts less. Where most of what was never solved cannot be learned, a prior costs more than it saves."""
    normalise: bool = True
    """Divide by the mean over the rows that are left. A common factor changes no loss; it matters beside rows of other
    sources, whose weight is 1."""

    @model_validator(mode="after")
    def _whole(self) -> "Paced":
        if self.prior is None and not (self.a.is_integer() and self.b.is_integer()):
            raise ValueError(f"prior: null wants whole a and b, got {self.a:g} and {self.b:g}: give a prior, e.g. 0.5")
        return self

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "solved", "attempts", by="paced")
        return [*(name for name in before if name != "weight"), "weight"]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        kept, weights, bands = [], [], Counter()
        pairs: Any = zip(rows["solved"], rows["attempts"], strict=True)
        for number, (solved, attempts) in enumerate(pairs):
            rate = None
            if solved is not None and attempts is not None and 0 <= solved <= attempts:
                rate = PassRate(solved, attempts)
            if rate is None or (weight := expected_weight(rate, self.a, self.b, self.prior)) is None:
                desk.counts.note("too few attempts to weigh by", f"row {number}")
                continue
            kept.append(number)
            weights.append(weight)
            bands[f"solved {rate.band}" if rate.attempts else "never tried"] += 1
        desk.counts.figures |= {f"rows of prompts {band}": count for band, count in sorted(bands.items())}
        mean = sum(weights) / max(1, len(weights))
        if self.normalise and mean:
            weights = [weight / mean for weight in weights]
        return with_columns(rows.select(kept), {"weight": weights})
