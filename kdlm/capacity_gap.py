"""How large a teacher suits a student: the law of the capacity gap, and what it says of the models at hand."""

import math
from collections.abc import Mapping
from typing import Any

BEST = 2.5
"""The best teacher is about so many times the student (arXiv 2311.07052: 2.498 S - 11.5, in millions of weights, over
GPT-2 and Pythia; students pruned from the teacher, token-level cross-entropy). Another start or loss may move it."""
FAR = 5.0
"""From this many times on a smaller teacher is likely to teach better."""


def nearest(student: int, teachers: Mapping[str, int]) -> str:
    """Return the name of the teacher whose size is nearest to 2.5 times the student's, as a ratio; the smaller of two.

    Args:
        student: number of weights.
        teachers: those of each teacher, by name. At least one.
    """
    return min(teachers, key=lambda name: (abs(math.log(teachers[name] / (BEST * student))), teachers[name]))


def advice(student: int, teachers: Mapping[str, int]) -> list[str]:
    """Return a line for each teacher: how much larger it is, and of several which suits best."""
    best, lines = nearest(student, teachers), []
    for name, size in teachers.items():
        chosen = f"; of these {len(teachers)} the nearest to {BEST} times" if len(teachers) > 1 and name == best else ""
        lines.append(f"{name}: {size / student:.1f} times the student's size{chosen}")
    return lines


def warning(student: int, teachers: Mapping[str, int]) -> str:
    """Return what to be careful of where even the nearest teacher is beyond 5 times the student, else nothing."""
    if teachers[nearest(student, teachers)] <= FAR * student:
        return ""
    return (
        f"the teacher is more than {FAR:g} times as large as the student: one of about {BEST} times is likely to teach "
        "better, or to teach in between (docs/pruning.md)"
    )


def parameters(config: Any) -> int:
    """Return the number of weights of the causal language model of a configuration, without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())
