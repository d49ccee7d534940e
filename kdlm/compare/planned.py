"""The runs of a comparison as recipes, all of them looked at before the first begins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlm.check import check
from kdlm.compare.sections import Candidate, Comparison
from kdlm.recipe import Recipe, load, resolved
from kdlm.section import Section


@dataclass(frozen=True)
class Planned:
    """One run to make.

    Attributes:
        path: the recipe's file.
        overrides: what is changed in it, seeds and folder of the run included.
        recipe: the two, read.
    """

    name: str
    seed: int
    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def finished(self) -> bool:
        """Whether the run is there, with its results."""
        return (self.folder / "results.json").is_file() and (self.folder / "student").is_dir()


def planned(comparison: Comparison, known: Sequence[str] = ()) -> list[Planned]:
    """Return every run, seed after seed.

    Raises ValueError with the problems that are `known`, and with all that is wrong with any of the recipes, one a
    line with the run that it belongs to.
    """
    problems = [*known]
    found: dict[str, list[Planned]] = {}
    for name, candidate in comparison.runs.items():
        try:
            found[name] = seeded(name, candidate, comparison)
            check(found[name][0].recipe)
        except (ValueError, OSError) as error:
            problems += [f"{name}: {line}" for line in str(error).splitlines()]
    problems += [line for runs in found.values() for run in runs for line in strangers(run)]
    if problems:
        raise ValueError("\n".join(problems))
    return [runs[place] for place in range(len(comparison.seeds)) for runs in found.values()]


def seeded(name: str, candidate: Candidate, comparison: Comparison) -> list[Planned]:
    """Return the run of a name for every seed. Raises ValueError when the recipe is wrong."""
    changes = [*comparison.overrides, *candidate.overrides]
    first = load(candidate.recipe, [*changes, f"run_dir={comparison.output / name}"])
    keys = ["seed", *_seeds_of(first.student, "student")]
    runs = []
    for seed in comparison.seeds:
        own = [f"{key}={seed}" for key in keys] + [f"run_dir={comparison.output / f'{name}-{seed}'}"]
        runs.append(Planned(name, seed, candidate.recipe, (*changes, *own), load(candidate.recipe, [*changes, *own])))
    return runs


def _seeds_of(value: Any, key: str) -> Iterator[str]:
    """Yield the dotted keys of the seeds in a section: of random weights a student begins with."""
    if not isinstance(value, Section):
        return
    for field, child in value:
        if field == "seed":
            yield f"{key}.{field}"
        yield from _seeds_of(child, f"{key}.{field}")


def strangers(run: Planned) -> list[str]:
    """Return a line if the folder of a run holds another one."""
    described = run.folder / "recipe.yaml"
    if not described.is_file():
        return []
    before, now = load(described), run.recipe
    theirs: Any = before.teacher
    if getattr(now.teacher, "placement", None) == "auto" and hasattr(theirs, "placement"):  # the run settled it
        before = before.model_copy(update={"teacher": theirs.model_copy(update={"placement": "auto"})})
    if resolved(before) == resolved(now):
        return []
    changed = ", ".join(differences(before.model_dump(mode="json"), now.model_dump(mode="json")))
    return [f"{run.name}: {run.folder} holds a run of another recipe ({changed}): remove it, or change `output`"]


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Return the dotted keys in which two recipes differ, each as `key: before -> now`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted(before.keys() | now.keys())
        return [line for k in keys for line in differences(before.get(k), now.get(k), f"{key}.{k}".lstrip("."))]
    if isinstance(before, Sequence) and isinstance(now, Sequence) and not isinstance(before, str):
        if len(before) == len(now):
            pairs = enumerate(zip(before, now, strict=True))
            return [line for k, (b, n) in pairs for line in differences(b, n, f"{key}.{k}")]
    return [] if before == now else [f"{key}: {before!r} -> {now!r}"]
