"""Terms: what one pass over the logits adds up, and the few formulas that all of it comes down to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor

OPTIONS: Mapping[str, Mapping[str, float | None]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "skew_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
    "generalised_jsd": {"beta": 0.5, "normalised": False},
    "total_variation": {},
    "adaptive_kl": {"head_mass": 0.5},
    "alpha_mixture": {"alpha": 0.0, "share": 0.1},
    "taid_kl": {"t": None},
    "cross_entropy": {},
}
"""Every term, with its options and their defaults (None: must be given)."""

MEASURES = ("student_entropy", "top1_agreement", "accuracy", "teacher_cross_entropy")
"""What can be watched beside the terms, without gradient, at temperature 1."""


class Kind(IntEnum):
    """The formulas. Everything in `OPTIONS` is one of them, or the end point of one."""

    FORWARD = 0
    REVERSE = 1
    SKEW = 2
    SKEW_REVERSE = 3
    JSD = 4
    TOTAL_VARIATION = 5
    ADAPTIVE = 6
    POWER_MEAN = 7
    GEOMETRIC = 8
    TAID = 9
    CROSS_ENTROPY = 10
    ENTROPY = 11
    TEACHER_CROSS_ENTROPY = 12


class Formula(NamedTuple):
    """A term as the row formulas see it: everything that stays the same over training.

    Attributes:
        scale: factor on the value (T^2, normalisation).
        a, b: the formula's own numbers: the teacher's share (SKEW, POWER_MEAN, GEOMETRIC; JSD's beta), the student's
            (SKEW_REVERSE), the head's mass (ADAPTIVE); the exponent (POWER_MEAN).
        graded: whether the gradient counts: a term of weight 0 is measured only.
    """

    kind: Kind
    temperature: float = 1.0
    scale: float = 1.0
    a: float = 0.0
    b: float = 0.0
    graded: bool = True

    @property
    def whole_vocabulary(self) -> bool:
        """Whether it looks at all of the student's ids, also at those that the teacher lacks."""
        return self.kind in (Kind.CROSS_ENTROPY, Kind.ENTROPY)

    @property
    def needs_labels(self) -> bool:
        return self.kind in (Kind.CROSS_ENTROPY, Kind.TEACHER_CROSS_ENTROPY)

    @property
    def needs_teacher(self) -> bool:
        return not self.whole_vocabulary


@dataclass(frozen=True)
class Term:
    """One term of a sum: `weight * name(student, teacher; temperature, options)` on every row.

    Attributes:
        name: a key of `OPTIONS`.
        weight: factor in the sum; 0 measures the term and leaves it out of the gradient.
        temperature: divides the logits of both models. Cross-entropy has none.
        t_squared: multiply the value by temperature^2 (Hinton).
        options: as in `OPTIONS`; `t` of `taid_kl` may be a scalar tensor.

    Raises ValueError for an unknown name or option, and for a number outside its range.
    """

    name: str
    weight: float = 1.0
    temperature: float = 1.0
    t_squared: bool = True
    options: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if self.name not in OPTIONS:
            raise ValueError(f"unknown divergence {self.name!r}: there are {', '.join(OPTIONS)}")
        known = OPTIONS[self.name]
        if unknown := [name for name in self.options if name not in known]:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise ValueError(f"{self.name}: unknown option {unknown[0]!r}; it {takes}")
        if missing := [name for name, default in known.items() if default is None and name not in self.options]:
            raise ValueError(f"{self.name} needs the option {missing[0]!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name, value in self.options.items():
            if not isinstance(value, Tensor):  # looking into a tensor would wait for the device
                _check(name, value)

    @classmethod
    def named(cls, name: str, weight: float = 1.0, **options: Any) -> "Term":
        """Build a term from one set of keywords: `temperature`, `t_squared`, and the options of `name`."""
        general = {key: options.pop(key) for key in ("temperature", "t_squared") if key in options}
        return cls(name, weight, options=options, **general)

    def option(self, name: str) -> float | Tensor:
        """Return an option or its default."""
        value = self.options.get(name, OPTIONS[self.name][name])
        assert value is not None
        return value

    @property
    def formula(self) -> Formula:
        """The formula behind this term: limits and end points are the simpler formulas that they equal."""
        kind, scale, a, b = self._reduced()
        square = self.temperature**2 if self.t_squared else 1.0
        return Formula(kind, self.temperature, scale * square, a, b, self.weight != 0)

    def _reduced(self) -> tuple[Kind, float, float, float]:
        match self.name:
            case "forward_kl":
                return Kind.FORWARD, 1.0, 0.0, 0.0
            case "reverse_kl":
                return Kind.REVERSE, 1.0, 0.0, 0.0
            case "skew_kl":
                skew = float(self.option("skew"))
                return Kind.SKEW if skew else Kind.FORWARD, 1.0, skew, 0.0
            case "skew_reverse_kl":
                skew = float(self.option("skew"))
                return Kind.SKEW_REVERSE if skew else Kind.REVERSE, 1.0, skew, 0.0
            case "generalised_jsd":
                beta = float(self.option("beta"))
                if beta in (0, 1):
                    return Kind.REVERSE if beta else Kind.FORWARD, 1.0, 0.0, 0.0
                return Kind.JSD, 1 / (beta * (1 - beta)) if self.option("normalised") else 1.0, beta, 0.0
            case "total_variation":
                return Kind.TOTAL_VARIATION, 1.0, 0.0, 0.0
            case "adaptive_kl":
                return Kind.ADAPTIVE, 1.0, float(self.option("head_mass")), 0.0
            case "alpha_mixture":
                share, exponent = float(self.option("share")), (1 - float(self.option("alpha"))) / 2
                if not share:
                    return Kind.FORWARD, 1.0, 0.0, 0.0
                if exponent == 1:
                    return Kind.SKEW, 1.0, share, 0.0
                return Kind.POWER_MEAN if exponent else Kind.GEOMETRIC, 1.0, share, exponent
            case "taid_kl":
                return Kind.TAID, 1.0, 0.0, 0.0
        return Kind.CROSS_ENTROPY, 1.0, 0.0, 0.0


MEASURED = {
    "student_entropy": Formula(Kind.ENTROPY, graded=False),
    "teacher_cross_entropy": Formula(Kind.TEACHER_CROSS_ENTROPY, graded=False),
}
"""The measures that are sums over the vocabulary. The two others compare arg-maxima."""


def _check(name: str, value: float) -> None:
    """Raise ValueError where an option lies outside its range."""
    if name in ("skew", "share") and not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}: at 1 the divergence is 0 whatever the student says")
    if name in ("beta", "head_mass", "t") and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if name == "alpha" and not math.isfinite(value):
        raise ValueError(f"alpha must be finite, got {value}")


def unique_names(terms: Sequence[Term]) -> list[str]:
    """Return one name per term: `forward_kl`, `forward_kl_1`, ..."""
    names: list[str] = []
    for term in terms:
        seen = sum(other.name == term.name for other in terms[: len(names)])
        names.append(f"{term.name}_{seen}" if seen else term.name)
    return names
