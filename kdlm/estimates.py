"""Estimates: a figure with its standard error, and what that error allows to say."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

Readings = Sequence[float] | Real[np.ndarray, "n"]


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, both nan where there was nothing to count.

    Attributes:
        value: in the unit of what was measured.
        error: standard error, in the same unit; nan where one reading cannot tell.
        freedom: degrees of freedom of the error: infinite where it comes of many independent things.
    """

    value: float
    error: float
    freedom: float = math.inf

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the confidence interval, by Student's t: for three seeds twice as wide as a normal's."""
        from scipy.stats import t

        reach = float(t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.value - reach, self.value + reach

    @property
    def p_value(self) -> float:
        """How likely a figure as far from 0 is, on either side, if the true one is 0; 1 for 0 ± 0."""
        from scipy.stats import t

        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def mean(values: Readings) -> Estimate:
    """Return the mean of independent readings, such as seeds, with n - 1 degrees of freedom; of one, error nan."""
    readings, n = np.asarray(values, dtype=np.float64), len(values)
    if n < 2:
        return Estimate(float(readings.mean()) if n else math.nan, math.nan, 0.0)
    return Estimate(float(readings.mean()), float(readings.std(ddof=1) / math.sqrt(n)), n - 1.0)


def paired(ours: Readings, theirs: Readings) -> Estimate:
    """Return the mean difference `ours - theirs` of readings of the same things: documents, or seeds.

    Its p-value is that of the paired t-test. Raises ValueError for unequal numbers of readings.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"paired readings are of the same things, got {len(ours)} and {len(theirs)} of them")
    return mean(np.subtract(ours, theirs).tolist())


def ratio(sums: Readings, counts: Readings) -> Estimate:
    """Return `sum(sums) / sum(counts)`, a mean per token of texts that are independent of each other; jackknife error.

    Tokens of one text depend on each other, so an error over tokens would be too small.
    """
    rows = np.stack([np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)], axis=1)
    return jackknife(rows, lambda totals: totals[0] / totals[1] if totals[1] else math.nan)


def jackknife(rows: Float[np.ndarray, "n columns"], figure: Callable[[np.ndarray], float]) -> Estimate:
    """Return `figure` of the sums over rows; its error comes from leaving out one row after another."""
    total, n = rows.sum(0), len(rows)
    without = np.array([figure(total - row) for row in rows])
    error = float(np.sqrt((n - 1) * without.var())) if n > 1 else math.nan
    return Estimate(figure(total), error, n - 1.0)
