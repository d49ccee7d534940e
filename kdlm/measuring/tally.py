"""Tally: what was measured, summed by document, so that batches and ranks add up and errors are over documents."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from kdlm.estimates import Estimate, jackknife, ratio
from kdlm.measuring.derived import DRAFTED, derived
from kdlm.measuring.reading import Reading
from kdlm.quality.calibration import BINS, calibration_error, reliability, reliability_sums

SIDES = {"student": ("confidence", "accuracy"), "teacher": ("teacher_confidence", "teacher_accuracy")}
"""What a reliability diagram is made of."""
_INNER = ("confidence", "teacher_confidence", "bytes", "their_nats", "their_bytes")
"""Sums that other figures are made of, and that are no figure of their own."""


class Measured(TypedDict):
    """What `measure` returns, ready for JSON: figures with their standard errors, None where one is not known."""

    tokens: int
    documents: int
    metrics: dict[str, dict[str, float | None]]
    reliability: dict[str, dict[str, list]]
    notes: list[str]


class Tally:
    """Sums of every measure over the kept tokens of each document."""

    def __init__(self) -> None:
        self.documents: dict[int, dict[str, float]] = {}
        self.bins: dict[int, dict[str, Tensor]] = {}

    def add(self, reading: Reading, documents: Sequence[int]) -> None:
        """Add a batch; `documents` are the numbers of the documents that its sequences are of."""
        ones = torch.ones(len(reading.rows), dtype=torch.float64)
        values, numbers = {"tokens": ones, **reading.values}, torch.as_tensor(documents)
        self._add(values, numbers[reading.sequences])
        if reading.theirs and reading.their_sequences is not None:
            self._add(reading.theirs, numbers[reading.their_sequences])

    def _add(self, values: dict[str, Tensor], documents: Tensor) -> None:
        found, places = documents.unique(return_inverse=True)
        totals = {
            name: torch.zeros(len(found), dtype=torch.float64).index_add_(0, places, value)
            for name, value in values.items()
        }
        for place, document in enumerate(found.tolist()):
            sums = self.documents.setdefault(document, {})
            for name, value in totals.items():
                sums[name] = sums.get(name, 0.0) + value[place].item()
            for side, (confidence, accuracy) in SIDES.items():
                if confidence in values and accuracy in values:
                    here = places == place
                    more = reliability_sums(values[confidence][here], values[accuracy][here])
                    bins = self.bins.setdefault(document, {})
                    bins[side] = bins[side] + more if side in bins else more

    def __add__(self, other: "Tally") -> "Tally":
        """Return both together: of two ranks, or of two files. A document that is in both is one document."""
        whole = Tally()
        for part in (self, other):
            for document, sums in part.documents.items():
                into = whole.documents.setdefault(document, {})
                for name, value in sums.items():
                    into[name] = into.get(name, 0.0) + value
            for document, sides in part.bins.items():
                into = whole.bins.setdefault(document, {})
                for side, bins in sides.items():
                    into[side] = into[side] + bins if side in into else bins
        return whole

    def estimates(self, *, drafted: int = DRAFTED) -> dict[str, Estimate]:
        """Return every figure with its jackknife standard error over documents."""
        names = list(dict.fromkeys(name for sums in self.documents.values() for name in sums))
        rows = np.array([[sums.get(name, 0.0) for name in names] for sums in self.documents.values()])
        if not names or not rows[:, names.index("tokens")].sum():
            return {}
        column, tokens = dict(zip(names, rows.T, strict=True)), rows[:, names.index("tokens")]
        inner = ("tokens", *_INNER)
        found = {name: ratio(column[name], tokens) for name in names if name not in inner}

        def figures(totals: np.ndarray) -> dict[str, float]:
            count = totals[names.index("tokens")] or math.nan
            return derived(dict(zip(names, totals / count, strict=True)), drafted=drafted)

        for name in figures(rows.sum(0)):
            found[name] = jackknife(rows, lambda totals, name=name: figures(totals)[name])
        for side, error in (("student", "ece"), ("teacher", "teacher_ece")):
            flat = [self.bins[document][side].flatten() for document in self.bins if side in self.bins[document]]
            if flat:
                found[error] = jackknife(torch.stack(flat).numpy(), _binned_error)
        return found

    def measured(self, notes: Sequence[str] = (), *, drafted: int = DRAFTED) -> Measured:
        """Return everything in the form that jobs, reports and pages share."""
        sides = {}
        for side in SIDES:
            bins = [found[side] for found in self.bins.values() if side in found]
            if bins:
                sides[side] = reliability(torch.stack(bins).sum(0))
        return {
            "tokens": round(sum(sums.get("tokens", 0.0) for sums in self.documents.values())),
            "documents": sum(sums.get("tokens", 0.0) > 0 for sums in self.documents.values()),
            "metrics": {name: figure.as_json() for name, figure in self.estimates(drafted=drafted).items()},
            "reliability": sides,
            "notes": list(notes),
        }


def _binned_error(flat: np.ndarray) -> float:
    return calibration_error(torch.from_numpy(flat.reshape(3, BINS)))
