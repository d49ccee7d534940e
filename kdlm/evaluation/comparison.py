"""What is read of student, teacher and start on the same tokens, by name: sums, that batches and ranks add up."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdlm.evaluation.section import unknown
from kdlm.losses import all_measures_for, measures_for
from kdlm.measuring import Reading, derived
from kdlm.quality import calibration_error, reliability_sums
from kdlm.signal import Dense

MADE_OF = {
    "perplexity": ("cross_entropy",),
    "bits_per_byte": ("cross_entropy",),
    "teacher_perplexity": ("teacher_cross_entropy",),
    "teacher_bits_per_byte": ("teacher_cross_entropy",),
    "block_efficiency": ("acceptance_rate",),
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


def refusal(name: str, known: Collection[str]) -> str:
    """Return why a metric cannot be read: this teacher does not tell it, or there is none of that name."""
    if name in possible(Dense):
        return f"{name!r} cannot be had with this teacher. There are {', '.join(known)}"
    return unknown(name, known)


def by_default(teacher: Any) -> tuple[str, ...]:
    """Return the measures that evaluation takes with this teacher; those of the student where its kind is unknown."""
    kinds = getattr(teacher, "signals", frozenset())
    return min((measures_for(kind) for kind in kinds or {None}), key=len)


def ingredients(names: Sequence[str]) -> tuple[str, ...]:
    """Return the measures that these metrics are made of."""
    return tuple(dict.fromkeys(part for name in names for part in MADE_OF.get(name, (name,))))


def sums_of(reading: Reading) -> dict[str, Tensor]:
    """Return the sums of a batch: tokens, each measure over them, and `[3, bins]` of each calibration."""
    sums = {COUNT: torch.tensor(float(len(reading.rows)), dtype=torch.float64)}
    sums |= {name: value.sum() for name, value in reading.values.items()}
    for name in ("ece", "teacher_ece"):
        if set(MADE_OF[name]) <= reading.values.keys():
            sums[name] = reliability_sums(*(reading.values[part] for part in MADE_OF[name]))
    return sums


def figures_of(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics that sums over all tokens of all ranks come to."""
    count = max(1.0, sums[COUNT].item())
    means = {name: value.item() / count for name, value in sums.items() if name != COUNT and not value.ndim}
    return {**means, **derived(means), **{name: calibration_error(value) for name, value in sums.items() if value.ndim}}
