"""Metrics: what the figures of a model and of a run are called, what they are counted in, and which way is better."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """A figure's name for people.

    Attributes:
        unit: what it is shown in; empty for a plain number.
        better: 1 where more is better, -1 where less is, 0 where neither is known to be.
        scale: what a logged value is multiplied with to be in `unit`: 100 of a share for percent.
    """

    title: str
    unit: str = ""
    better: int = 0
    scale: float = 1

    @property
    def label(self) -> str:
        """The title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


def _share(title: str, better: int = 1) -> Metric:
    return Metric(title, "%", better, 100)


METRICS = {
    "cross_entropy": Metric("cross-entropy", "nats", -1),
    "perplexity": Metric("perplexity", "", -1),
    "bits_per_byte": Metric("bits per byte", "bits/byte", -1),
    "kl_to_teacher": Metric("KL to the teacher", "nats", -1),
    "reverse_kl_to_teacher": Metric("reverse KL to the teacher", "nats", -1),
    "top1_agreement": _share("top-1 agreement"),
    "top5_agreement": _share("top-5 agreement"),
    "accuracy": _share("accuracy"),
    "gap_closed": _share("gap closed"),
    "acceptance_rate": _share("acceptance rate"),
    "block_efficiency": Metric("block efficiency", "tokens/block", 1),
    "ece": _share("calibration error", -1),
    "brier": Metric("Brier score", "", -1),
    "kl_to_start": Metric("KL from the start", "nats", -1),
    "other_cross_entropy": Metric("cross-entropy of other text", "nats", -1),
    "other_kl_to_start": Metric("KL from the start on other text", "nats", -1),
    "student_entropy": Metric("student's entropy", "nats"),
    "teacher_entropy": Metric("teacher's entropy", "nats"),
    "score": Metric("score of completions", "", 1),
    "rollout_reward": Metric("reward", "", 1),
    "length": Metric("length of completions", "tokens"),
    "truncated": _share("completions cut short", -1),
    "repetition_4": _share("repeated 4-grams", -1),
    "distinct_1": _share("distinct-1", 0),
    "distinct_2": _share("distinct-2", 0),
    "matched": _share("images matched to their text"),
    "fd": Metric("Frechet distance of features", "", -1),
    "fd_pixel": Metric("Frechet distance of raw values", "", -1),
    "mmd": Metric("MMD²", "", -1),
    "precision": _share("precision"),
    "recall": _share("recall"),
    "good": _share("samples near a mode"),
    "modes": Metric("modes found", "", 1),
    "fgsm_accuracy": _share("accuracy under FGSM"),
    "cw_accuracy": _share("accuracy under Carlini and Wagner"),
    "cw_distance": Metric("distance that misleads", "", 1),
    "router_balance": Metric("imbalance of the routers", "", -1),
    "expert_load": Metric("load of the busiest expert", "times its share", -1),
    "loss": Metric("training objective", "", -1),
    "tokens_per_second": Metric("throughput", "tokens/s", 1),
    "images_per_second": Metric("throughput", "images/s", 1),
    "samples_per_second": Metric("throughput", "samples/s", 1),
    "memory_gib": Metric("memory", "GiB", -1),
    "grad_norm": Metric("gradient norm"),
    "learning_rate": Metric("learning rate"),
    "prefill_tokens_per_second": Metric("reading prompts", "tokens/s", 1),
    "decode_tokens_per_second": Metric("writing", "tokens/s", 1),
    "first_token_seconds": Metric("first token", "ms", -1, 1e3),
    "peak_memory_bytes": Metric("peak memory", "MiB", -1, 2.0**-20),
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
    """Return what is known of a figure by its key, with or without the `eval_` of logs."""
    name = name.removeprefix("eval_")
    if known := METRICS.get(name):
        return known
    ours = METRICS.get(name.removeprefix("teacher_")) if name in TEACHERS.values() else None
    return replace(ours, title=f"teacher's {ours.title}", better=0) if ours else Metric(name.replace("_", " "))


def gap_closed(before: float, student: float, teacher: float) -> float:
    """Return `(before - student) / (before - teacher)` of three losses: 0 is no better than before, 1 the teacher.

    nan where the teacher is no better than `before` but for rounding: there is no gap to close then. `before` is the
    model that distillation began with, or a baseline trained without it.
    """
    if not teacher < before or math.isclose(before, teacher, rel_tol=1e-7):
        return math.nan
    return (before - student) / (before - teacher)
