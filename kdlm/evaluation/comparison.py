"""What is read of student, teacher and the student as it began on the same tokens: sums, that ranks add up."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdlm.evaluation.section import unknown
from kdlm.losses import all_measures_for, kept_rows, measures_for, weighted_sum
from kdlm.quality import calibration_error, reliability_sums
from kdlm.signal import Rows, Signal

MADE_OF = {
    "perplexity": ("cross_entropy",),
    "ece": ("confidence", "accuracy"),
    "teacher_ece": ("teacher_confidence", "teacher_accuracy"),
}
"""Metrics that are no mean over tokens, and the measures that they are made of."""
COUNT = "tokens"
"""The name of the number of tokens among sums."""


def possible(signal: type | None) -> tuple[str, ...]:
    """Return the metrics that can be had with a teacher that gives `signal` (a class, or None without one)."""
    measures = all_measures_for(signal)
    return (*measures, *(name for name, parts in MADE_OF.items() if set(parts) <= set(measures)))


def signal_of(teacher: Any, batch: Mapping[str, Any], rows: Rows) -> Signal | None:
    """Return what a teacher says of the rows; None where it reads the text with a tokenizer of its own."""
    return None if teacher is None or "theirs" in batch else teacher(batch, rows)


@torch.no_grad()
def sums_of(
    batch: dict[str, Tensor],
    student: Callable[..., Any],
    teacher: Any = None,
    start: Any = None,
    *,
    names: Sequence[str] | None,
    vocab: Any = None,
) -> dict[str, Tensor]:
    """Return sums over the batch's kept tokens: how many there are, of each measure, of the bins of each calibration.

    Args:
        batch: as methods get it.
        student, teacher, start: give a signal of `(batch, rows)`; the latter two may be None.
        names: of `possible`; None for what evaluation watches by default.
        vocab: ids that student and teacher share.

    Raises ValueError for a name that cannot be had with this teacher.
    """
    rows = kept_rows(batch["labels"])
    ours, theirs = student(batch, rows), signal_of(teacher, batch, rows)
    kind = None if theirs is None else type(theirs)
    names = measures_for(kind) if names is None else names
    for name in names:
        if name not in possible(kind):
            raise ValueError(f"evaluation.measures: {unknown(name, possible(kind))}")
    wanted = dict.fromkeys(part for name in names for part in MADE_OF.get(name, (name,)))
    parts: dict[str, Tensor] = {}
    if wanted:
        _, parts = weighted_sum([], ours, theirs, rows.labels, vocab=vocab, measures=tuple(wanted))
    sums = {name: value.double().sum() for name, value in parts.items()}
    for name in ("ece", "teacher_ece"):
        if name in names:
            sums[name] = reliability_sums(*(parts[part].double() for part in MADE_OF[name]))
    if start is not None:
        _, forgotten = weighted_sum([], ours, start(batch, rows), rows.labels, measures=("kl_to_teacher",))
        sums["kl_to_start"] = forgotten["kl_to_teacher"].double().sum()
    return {COUNT: torch.tensor(float(len(rows.labels)), dtype=torch.float64, device=rows.labels.device), **sums}


def figures_of(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics that sums over all tokens of all ranks come to."""
    count = max(1.0, sums[COUNT].item())
    found = {name: value.item() / count for name, value in sums.items() if name != COUNT and not value.ndim}
    found |= {name: calibration_error(value) for name, value in sums.items() if value.ndim}
    if "cross_entropy" in found:
        found["perplexity"] = math.exp(min(found["cross_entropy"], 700.0))
    return found


def gap_closed(before: float, student: float, teacher: float) -> float:
    """Return `(before - student) / (before - teacher)` of three losses: 0 is no better than before, 1 the teacher.

    nan where there is no gap. `before` is the model that distillation began with, or a baseline trained without it.
    """
    return (before - student) / (before - teacher) if before != teacher else math.nan
