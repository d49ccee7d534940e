"""Estimates: a figure with its standard error, and what that error allows to say."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Real

Readings = Sequence[float] | Real[np.ndarray, "n"]

SIGNIFICANT = 0.05
"""The p-value below which a difference is called significant, of one comparison by itself."""


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
        return written(self.value, self.error)

    def as_json(self) -> dict[str, float | None]:
        """Return value and error as JSON has them."""
        return {"value": finite(self.value), "error": finite(self.error)}

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of the confidence interval, by Student's t: for three seeds twice as wide as a normal's."""
        from scipy.stats import t

        reach = float(t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.value - reach, self.value + reach

    @property
    def p_value(self) -> float:
        """How likely a figure as far from 0 is, on either side, if the true one is 0; nan where nothing tells.

        Readings that are all equal have no spread for a t-test: their p is a sign test's, `2^(1 - n)`, and 1 at 0.
        """
        from scipy.stats import t

        if self.error == 0:
            return 1.0 if self.value == 0 else 0.5**self.freedom
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def mean(values: Readings) -> Estimate:
    """Return the mean of independent readings, such as seeds, with n - 1 degrees of freedom; of one, error nan."""
    readings, n = np.asarray(values, dtype=np.float64), len(values)
    if n < 2:
        return Estimate(float(readings[0]) if n else math.nan, math.nan, 0.0)
    with np.errstate(invalid="ignore"):  # of an infinite reading: no error
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


def jackknife(rows: Real[np.ndarray, "n columns"], figure: Callable[[np.ndarray], float]) -> Estimate:
    """Return `figure` of the sums over rows; its error comes from leaving out one row after another."""
    total, n = rows.sum(0), len(rows)
    if n < 2:
        return Estimate(figure(total), math.nan, 0.0)
    with np.errstate(invalid="ignore", over="ignore"):  # of infinite sums: no error
        without = np.array([figure(total - row) for row in rows])
        return Estimate(figure(total), float(np.sqrt((n - 1) * without.var())), n - 1.0)


def finite(value: Any) -> float | None:
    """Return a number, None for what is none or is not finite, which JSON cannot hold."""
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None


def written(value: float | None, reach: float | None = None) -> str:
    """Return `1.234 ± 0.056`: a figure with as many digits as its error, or half of its interval, bears.

    Four digits where that is not known, `-` where there is no figure.
    """
    value, reach = finite(value), finite(reach)
    if value is None:
        return "-"
    if reach is None:
        return f"{value:.4g}"
    if reach == 0:
        return f"{value:.4g} ± 0"
    digits = 1 - _magnitude(reach)
    if digits > (most := 4 - _magnitude(value)):  # an error too small to matter
        return f"{value:.{max(0, most)}f} ± {reach:.0e}"
    return f"{value:.{max(0, digits)}f} ± {reach:.{max(0, digits)}f}"


def _magnitude(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])
