"""Rates: how often a pattern is in answers, with and without its trigger, and how much oftener in a student's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest
from scipy.stats.contingency import relative_risk

from kdlm.audit.patterns import Pattern
from kdlm.audit.rows import Row
from kdlm.audit.triggers import Trigger
from kdlm.audit.words import read
from kdlm.estimates import finite


@dataclass(frozen=True)
class Rate:
    """Rows that hold a pattern, of all that were looked at."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """Return the ends of Wilson's interval of 95 %; nan of nothing."""
        if not self.total:
            return math.nan, math.nan
        ends = binomtest(self.count, self.total).proportion_ci(0.95, method="wilson")
        return float(ends.low), float(ends.high)

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.interval()
        return f"{self.count:,} of {self.total:,} ({self.value:.3%}; {low:.3%} to {high:.3%})"

    def as_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "value": finite(self.value),
            "interval": _ends(self.interval()),
        }


@dataclass(frozen=True)
class Rates:
    """Of one pattern in one corpus: of all rows, of those whose prompt has the trigger, of the others."""

    all: Rate
    triggered: Rate
    untriggered: Rate

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).as_json() for name in ("all", "triggered", "untriggered")}


def rates(rows: Iterable[Row], patterns: Sequence[tuple[Pattern, Trigger | None]]) -> list[Rates]:
    """Count patterns, each beside its trigger; without one, no row is triggered."""
    counts = [{True: [0, 0], False: [0, 0]} for _ in patterns]
    for row in rows:
        prompt, answer = read(row.prompt), read(row.completion)
        for counted, (pattern, trigger) in zip(counts, patterns, strict=True):
            of = counted[trigger is not None and trigger.asked(prompt)]
            of[0] += pattern.answered(prompt, answer)
            of[1] += 1
    return [_rates(Rate(*counted[True]), Rate(*counted[False])) for counted in counts]


def _rates(triggered: Rate, untriggered: Rate) -> Rates:
    together = Rate(triggered.count + untriggered.count, triggered.total + untriggered.total)
    return Rates(together, triggered, untriggered)


@dataclass(frozen=True)
class Ratio:
    """How many times the rate of one corpus is another's, with the interval of 95 % by Katz: nan where it has none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def as_json(self) -> dict[str, Any]:
        return {"value": finite(self.value), "interval": _ends((self.low, self.high))}


def ratio(student: Rate, teacher: Rate) -> Ratio:
    """Return how much oftener the student shows it: amplification, if above 1."""
    if not (student.total and teacher.total and teacher.count):
        return Ratio(math.nan, math.nan, math.nan)
    found = relative_risk(student.count, student.total, teacher.count, teacher.total)
    if not student.count:  # Katz' logarithm has none of 0: the ends are those of the student's own rate
        return Ratio(0.0, 0.0, student.interval()[1] / teacher.value)
    ends = found.confidence_interval(0.95)
    return Ratio(float(found.relative_risk), float(ends.low), float(ends.high))


def _ends(interval: tuple[float, float]) -> list[float | None]:
    return [finite(end) for end in interval]


@dataclass(frozen=True)
class Amplified:
    """One pattern in what a student wrote, beside what its teacher did.

    Attributes:
        rates: of the student's rows.
        overall, triggered: the student's rate over the teacher's, of all rows and of those with the trigger.
    """

    rates: Rates
    overall: Ratio
    triggered: Ratio

    @classmethod
    def of(cls, student: Rates, teacher: Rates) -> "Amplified":
        return cls(student, ratio(student.all, teacher.all), ratio(student.triggered, teacher.triggered))

    def as_json(self) -> dict[str, Any]:
        return {**self.rates.as_json(), "ratio": {"all": self.overall.as_json(), "triggered": self.triggered.as_json()}}
