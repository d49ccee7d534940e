"""How watched figures went, look after look, and what crossed its limit: a rule of the looks alone."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlm.guards.section import GuardsSection

PREFIX = "guard/"
"""Of a figure's name in log lines."""
ADVICE = {
    "entropy": (
        "a lower learning rate, fresher text (rollouts.reuse: 1), a divergence that covers the teacher (forward_kl, "
        "jsd), a clip on it (method.clip), a self teacher that moves more slowly"
    ),
    "length": (
        "a lower learning rate, a verifier that does not pay for length, rollouts.truncated: mask, cross-entropy on "
        "the data's answers beside"
    ),
    "repetition": "a lower learning rate, a higher sampling temperature, cross-entropy on the data's answers beside",
    "chosen_nll": "a lower learning rate, a lower weight of the rejected side (method.alpha), fewer steps",
    "kl_to_start": "a lower learning rate, fewer steps, LoRA of a lower rank, other text among the training rows",
}


@dataclass(frozen=True)
class Crossing:
    """A figure that went beyond a limit.

    Attributes:
        level: what is to be done, `warn` or `stop`.
        step: optimiser steps done.
        start: its first value.
        limit: which one, in words.
        looks: how many in a row were beyond it.
    """

    guard: str
    level: str
    step: int
    value: float
    start: float
    limit: str
    looks: int

    def __str__(self) -> str:
        row = f" for {self.looks} looks in a row" if self.looks > 1 else ""
        return f"guards.{self.guard}.{self.level}: {self.value:.4g} at step {self.step} is {self.limit}{row}"

    @property
    def advice(self) -> str:
        """What may help."""
        return f"try {ADVICE[self.guard]}"


class Course:
    """The looks of a run so far. They are in its log, so a resumed run is judged by those that it has behind it."""

    def __init__(self, section: GuardsSection):
        self.section = section
        self.start: dict[str, float] = {}
        self.beyond: Counter[tuple[str, str]] = Counter()
        self.warned: set[str] = set()

    def take(self, step: int, figures: Mapping[str, float]) -> list[Crossing]:
        """Take in a look, and return what is to be done now."""
        found = []
        for name, watched in self.section.watched.items():
            if name not in figures:
                continue
            value = figures[name]
            start = self.start.setdefault(name, value)
            for level, limit in (("warn", watched.warn), ("stop", watched.stop)):
                said = "" if limit is None else limit.crossed(value, start)
                looks = self.beyond[name, level] = self.beyond[name, level] + 1 if said else 0
                if looks < watched.patience or (level == "warn" and name in self.warned):
                    continue
                if level == "warn":
                    self.warned.add(name)
                found.append(Crossing(name, level, step, value, start, said, looks))
        return found

    def replay(self, history: Iterable[Mapping[str, Any]]) -> Crossing | None:
        """Take in the looks of log lines; return what would have stopped the run at the last of them."""
        stops: list[Crossing] = []
        for line in history:
            if figures := {key.removeprefix(PREFIX): line[key] for key in line if key.startswith(PREFIX)}:
                stops = [one for one in self.take(line["step"], figures) if one.level == "stop"]
        return stops[0] if stops else None


def refuse_stopped(section: GuardsSection, history: Iterable[Mapping[str, Any]], where: str) -> Course:
    """Return the course of a run so far. Raises ValueError where these guards would stop it at once again."""
    course = Course(section)
    if (stop := course.replay(history)) is not None:
        raise ValueError(
            f"{stop}: its guard stopped the run in {where}. It goes on if the limit is changed (guards.{stop.guard}"
            f".stop=null, or a wider one) or from an earlier checkpoint; else {stop.advice}"
        )
    return course


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the log lines that a checkpoint has behind it."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
