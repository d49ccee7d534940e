"""Runs of one recipe that differ by their seed belong together; of different recipes, what differs is told."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlm.estimates import Estimate, mean
from kdlm.report.run import Run

SEEDS = frozenset({"seed", "student.seed"})
OWN = SEEDS | {"run_dir"}
"""Keys of a run alone, which are no difference of recipes."""
ASIDE = frozenset(
    f"training.{key}"
    for key in ("report_to", "run_name", "project", "logging_steps", "save_steps", "save_strategy", "save_total_limit")
)
"""Keys that change what is written down of a run, not what it learns."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, seed by seed."""

    label: str
    runs: list[Run]

    def final(self, name: str) -> Estimate | None:
        """Return the mean over the runs of a held-out figure, or None where one of them has none."""
        values = [run.final[name] for run in self.runs if name in run.final]
        return mean(values) if values and len(values) == len(self.runs) else None

    @property
    def seeds(self) -> list[Any]:
        return [run.recipe.get("seed") for run in self.runs]

    @property
    def baseline(self) -> bool:
        """Whether it learnt from the data alone: cross-entropy is its only loss."""
        losses = [loss.get("name") for loss in self.runs[0].recipe.get("losses") or [] if isinstance(loss, dict)]
        return bool(losses) and set(losses) == {"cross_entropy"}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return the runs in groups of one recipe and the same data, in the order in which they were given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        recipe = {key: value for key, value in flat(run.recipe).items() if key not in OWN | ASIDE}
        prints = run.data.get("fingerprints")
        found.setdefault(json.dumps([recipe, prints], sort_keys=True, default=str), []).append(run)
    return [Group(_label([run.name for run in group]), group) for group in found.values()]


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return plain data as dotted keys and their values; empty lists and mappings stay values."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = iter(enumerate(value))
    if items is None:
        return {key: value}
    return {
        name: leaf
        for inner, each in items
        for name, leaf in flat(each, f"{key}.{inner}" if key else str(inner)).items()
    }


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the dotted keys whose values are not the same in all recipes, with each one's value (None: not there).

    Seeds and the run folder are left out.
    """
    flats = [flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for each in flats for key in each if key not in OWN)
    values = {key: [each.get(key) for each in flats] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def comparable(groups: Sequence[Group]) -> bool:
    """Whether all were evaluated on the same data."""
    return len({json.dumps((run.data.get("fingerprints") or {}).get("eval")) for g in groups for run in g.runs}) <= 1


def _label(names: Sequence[str]) -> str:
    """Return what the names of a group have in common, without the number of a seed; or the first name."""
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    return re.sub(r"[-_./]*(seed)?[-_]*\d*$", "", common) or names[0]
