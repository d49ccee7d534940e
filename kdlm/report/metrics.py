"""What the figures of a run are called, what they are counted in, and which way is better."""

import math
from dataclasses import dataclass, replace
from typing import Any

from kdlm.report.markup import visible
from kdlm.report.run import is_number


@dataclass(frozen=True)
class Metric:
    """A figure's name for people.

    Attributes:
        unit: what it is counted in; empty for a plain number.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        share: a number from 0 to 1 that is shown in percent.
    """

    title: str
    unit: str = ""
    better: int = 0
    share: bool = False


METRICS = {
    "cross_entropy": Metric("cross-entropy", "nats", -1),
    "perplexity": Metric("perplexity", "", -1),
    "bits_per_byte": Metric("bits per byte", "bits/byte", -1),
    "kl_to_teacher": Metric("KL to the teacher", "nats", -1),
    "reverse_kl_to_teacher": Metric("reverse KL to the teacher", "nats", -1),
    "top1_agreement": Metric("top-1 agreement", "%", 1, True),
    "top5_agreement": Metric("top-5 agreement", "%", 1, True),
    "accuracy": Metric("accuracy", "%", 1, True),
    "gap_closed": Metric("gap closed", "%", 1, True),
    "acceptance_rate": Metric("acceptance rate", "%", 1, True),
    "block_efficiency": Metric("block efficiency", "tokens/block", 1),
    "ece": Metric("calibration error", "%", -1, True),
    "brier": Metric("Brier score", "", -1),
    "kl_to_start": Metric("KL from the start", "nats", -1),
    "student_entropy": Metric("student's entropy", "nats"),
    "teacher_entropy": Metric("teacher's entropy", "nats"),
    "loss": Metric("training objective", "", -1),
    "tokens_per_second": Metric("throughput", "tokens/s", 1),
    "images_per_second": Metric("throughput", "images/s", 1),
    "samples_per_second": Metric("throughput", "samples/s", 1),
    "memory_gib": Metric("memory", "GiB", -1),
    "grad_norm": Metric("gradient norm"),
    "learning_rate": Metric("learning rate"),
}
"""Figures that have a name of their own; others are called by their key. The first are the first in tables."""

TEACHERS = {
    "cross_entropy": "teacher_cross_entropy",
    "student_entropy": "teacher_entropy",
    "perplexity": "teacher_perplexity",
    "bits_per_byte": "teacher_bits_per_byte",
    "accuracy": "teacher_accuracy",
    "ece": "teacher_ece",
    "brier": "teacher_brier",
}
"""The teacher's own figure beside the student's."""


def metric(name: str) -> Metric:
    """Return what is known of a figure by its key."""
    if known := METRICS.get(name):
        return known
    ours = METRICS.get(name.removeprefix("teacher_")) if name in TEACHERS.values() else None
    return replace(ours, title=f"teacher's {ours.title}") if ours else Metric(visible(name.replace("_", " ")))


def shown(value: Any, name: str = "") -> str:
    """Return a number for people: three or four digits, percent where it is a share, a dash for none."""
    if not is_number(value):
        return "–"  # noqa: RUF001
    if not math.isfinite(value):
        return "not finite"
    if metric(name).share:
        return f"{100 * value:.1f}"
    return plain(value)


def plain(value: float) -> str:
    """Return four digits of a number, thousands apart, small ones with an exponent."""
    size = abs(value)
    if size >= 1000 or (size >= 100 and value == round(value)):
        return f"{value:,.0f}"
    if size == 0 or value == round(value):
        return f"{value:.0f}"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{max(1, 3 - math.floor(math.log10(max(1.0, size))))}f}"
