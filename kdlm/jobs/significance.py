"""significance: figures and differences with errors that come from single documents.

The harness keeps what each document gave: a number, or numbers that are added up before a figure is made of them. A
figure is looked for that makes the harness's own value of them; then its error, and that of a difference between two
models on the same documents, follow from leaving out one document after another.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlm.estimates import Estimate, jackknife, mean, paired

Figure = Callable[[np.ndarray], float]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


FIGURES: dict[int, dict[str, Figure]] = {
    1: {"mean": lambda s: s[1] / s[0], "perplexity": lambda s: math.exp(-s[1] / s[0])},
    2: {
        "weighted_perplexity": lambda s: math.exp(-s[1] / s[2]),
        "bits_per_byte": lambda s: -s[1] / s[2] / math.log(2),
        "ratio": lambda s: s[1] / s[2],
    },
    3: {
        "f1": lambda s: _share(2 * s[1], 2 * s[1] + s[2] + s[3]),
        "precision": lambda s: _share(s[1], s[1] + s[2]),
        "recall": lambda s: _share(s[1], s[1] + s[3]),
    },
}
"""By how many numbers a document gives: figures of the sums, after the number of documents.

Those of one and two numbers are the harness's own aggregations (`ratio` is its weighted mean); three are true
positives, false positives and false negatives.
"""


@dataclass(frozen=True)
class Documents:
    """What the documents of a task gave for one metric.

    Attributes:
        ids: what tells one document from another, in order.
        rows: a one, then the numbers of each.
        figure: the name, in FIGURES, of what makes the metric of their sums.
    """

    ids: tuple[Any, ...]
    rows: np.ndarray
    figure: str

    @property
    def of(self) -> Figure:
        """The metric of sums over rows, nan where it has none."""
        return _guarded(FIGURES[self.rows.shape[1] - 1][self.figure])

    def estimate(self) -> Estimate:
        """Return the metric with its standard error over documents."""
        return mean(self.rows[:, 1].tolist()) if self.figure == "mean" else jackknife(self.rows, self.of)


def documents(results: Mapping[str, Any], task: str, metric: str) -> dict[str, Documents | None]:
    """Return the documents behind a metric, for each model whose result (of `Tasks.evaluate`) has it.

    A group's documents are those of all its tasks. One figure has to make the values of all models; None for all of
    them where none does, or where a document gave no numbers.
    """
    figures = {name: result["tasks"][task]["metrics"][metric] for name, result in results.items()}
    read = {name: _rows(result, task, figures[name]) for name, result in results.items()}
    own = next(figure["metric"] for figure in figures.values())
    for figure in sorted((name for known in FIGURES.values() for name in known), key=lambda name: name != own):
        if all(found and _makes(figure, found[1], figures[name]["value"]) for name, found in read.items()):
            return {name: Documents(*found, figure) for name, found in read.items() if found}
    return dict.fromkeys(results)


def _makes(figure: str, rows: np.ndarray, value: float) -> bool:
    of = FIGURES.get(rows.shape[1] - 1, {}).get(figure)
    if of is None or not math.isfinite(value):
        return False
    return math.isclose(_guarded(of)(rows.sum(0)), value, rel_tol=1e-9, abs_tol=1e-12)


def _rows(result: dict[str, Any], task: str, metric: dict[str, Any]) -> tuple[tuple[Any, ...], np.ndarray] | None:
    """Return names and numbers of a metric's documents, None where they are no numbers, or not equally many."""
    ids, values = [], []
    for leaf in result["groups"].get(task, [task]):
        for sample in result["samples"].get(leaf, []):
            if sample["filter"] == metric["filter"] and metric["metric"] in sample:
                ids.append(
                    (leaf, sample["doc_id"], sample.get("target_hash"))
                )  # the data may be newer than what is kept
                values.append(_numbers(sample[metric["metric"]]))
    if len({len(value) for value in values}) != 1 or not all(
        isinstance(part, int | float) for value in values for part in value
    ):
        return None
    return tuple(ids), np.column_stack([np.ones(len(values)), np.asarray(values, dtype=np.float64)])


def _numbers(value: Any) -> Sequence[Any]:
    """Return what a document gave as numbers; of a choice and the probabilities of all choices, its Brier score."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        right, probabilities = value
        return [sum((p - (place == right)) ** 2 for place, p in enumerate(probabilities))]
    return value if isinstance(value, list) else [value]


def comparable(*models: Documents | None) -> bool:
    """Whether models answered the same documents, and are told of by the same figure."""
    known = [model for model in models if model is not None]
    return len(known) == len(models) and len({(model.ids, model.figure) for model in known}) == 1


def difference(ours: Documents, theirs: Documents) -> Estimate:
    """Return the metric of ours less that of theirs over the same documents.

    Of means its p-value is that of the paired t-test, of other figures that of a jackknife over the documents.
    """
    if ours.figure == "mean":
        return paired(ours.rows[:, 1].tolist(), theirs.rows[:, 1].tolist())
    figure, rows = ours.of, np.column_stack([ours.rows, theirs.rows])

    def less(sums: np.ndarray) -> float:
        one, other = np.split(sums, 2)
        return figure(one) - figure(other)

    return jackknife(rows, less)


def gap_closed(student: Documents, baseline: Documents, teacher: Documents) -> Estimate:
    """Return (student - baseline) / (teacher - baseline): 0 at the baseline, 1 at the teacher; jackknife error."""
    figure = student.of
    rows = np.column_stack([student.rows, baseline.rows, teacher.rows])

    def share(sums: np.ndarray) -> float:
        ours, base, best = (figure(part) for part in np.split(sums, 3))
        return (ours - base) / (best - base) if best != base else math.nan

    return jackknife(rows, share)


def _guarded(figure: Figure) -> Figure:
    def of(sums: np.ndarray) -> float:
        try:
            return float(figure(sums)) if (sums != 0).any() else math.nan
        except (ZeroDivisionError, OverflowError):
            return math.nan

    with_warnings_off = np.errstate(divide="ignore", invalid="ignore", over="ignore")
    return with_warnings_off(of)
