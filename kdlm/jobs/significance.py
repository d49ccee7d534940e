"""significance: figures and differences with errors that come from single documents.

The harness keeps what each document gave: a number, or numbers that are added up before a figure is made of them. A
figure is looked for that makes the harness's own value of them; then its error, and that of a difference between two
models on the same documents, follow from leaving out one document after another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlm.estimates import Estimate, jackknife, mean, paired

Figure = Callable[[np.ndarray], float]

FIGURES: dict[int, dict[str, Figure]] = {
    1: {"mean": lambda s: s[1] / s[0], "perplexity": lambda s: math.exp(-s[1] / s[0])},
    2: {
        "weighted perplexity": lambda s: math.exp(-s[1] / s[2]),
        "bits per unit": lambda s: -s[1] / s[2] / math.log(2),
        "ratio": lambda s: s[1] / s[2],
    },
    3: {"F1": lambda s: 2 * s[1] / (s[2] + s[3])},
}
"""By how many numbers a document gives: figures of their sums, after the number of documents.

F1 is of true positives, predicted and expected ones. The others are the harness's mean, perplexity,
weighted_perplexity, bits_per_byte and weighted_mean.
"""


@dataclass(frozen=True)
class Documents:
    """What the documents of a task gave for one metric.

    Attributes:
        ids: names of the documents, in order.
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


def documents(result: dict[str, Any], task: str, metric: dict[str, Any]) -> Documents | None:
    """Return the documents behind a metric of `Tasks.evaluate`'s result, a group's being those of all its tasks.

    None where single documents do not tell the metric.
    """
    ids: list[Any] = []
    values: list[Sequence[float]] = []
    for leaf in result["groups"].get(task, [task]):
        for sample in result["samples"].get(leaf, []):
            if sample["filter"] == metric["filter"] and metric["metric"] in sample:
                value = sample[metric["metric"]]
                ids.append((leaf, sample["doc_id"]))
                values.append(value if isinstance(value, list) else [value])
    sizes = {len(value) for value in values}
    if len(sizes) != 1 or not all(isinstance(part, int | float) for value in values for part in value):
        return None
    rows = np.column_stack([np.ones(len(values)), np.asarray(values, dtype=np.float64)])
    for name, figure in FIGURES.get(sizes.pop(), {}).items():
        if math.isclose(_guarded(figure)(rows.sum(0)), metric["value"], rel_tol=1e-9, abs_tol=1e-12):
            return Documents(tuple(ids), rows, name)
    return None


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
    figure, width = ours.of, ours.rows.shape[1]
    rows = np.column_stack([ours.rows, theirs.rows])
    return jackknife(rows, lambda sums: figure(sums[:width]) - figure(sums[width:]))


def gap_closed(student: Documents, baseline: Documents, teacher: Documents) -> Estimate:
    """Return (student - baseline) / (teacher - baseline): 0 at the baseline, 1 at the teacher; jackknife error."""
    figure, width = student.of, student.rows.shape[1]
    rows = np.column_stack([student.rows, baseline.rows, teacher.rows])

    def share(sums: np.ndarray) -> float:
        ours, base, best = (figure(sums[place : place + width]) for place in (0, width, 2 * width))
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
