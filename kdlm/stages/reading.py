"""From the file of a run of several stages to one recipe or pipeline for each, with where every value of it stands."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlm.curation import Pipeline
from kdlm.recipe import Recipe
from kdlm.section_loader import Origin, load_section, parse_override, read_mapping, replaced, suggestion, validated
from kdlm.stages.kinds import KINDS, Kind
from kdlm.stages.linking import Left, Links, exchanged, left_by, left_by_skipped
from kdlm.stages.sections import Stage, Stages
from kdlm.yaml_document import KeyPath, Problem, RecipeError, dotted


@dataclass(frozen=True)
class Planned:
    """One stage to run.

    Attributes:
        name: of the stage.
        number: its place, from 0.
        kind: what it does.
        folder: where: RUN_DIR/NAME.
        section: the recipe or pipeline that it runs, with paths in place of the names of stages.
        data: the same as plain data.
        takes: dotted key of the section -> the stage whose student, rows or signals are there: the one that was run,
            where the named one is skipped.
        carry: roles whose weights go on.
        skip: whether it is left out.
        anew: whether the student would come from a stage that is skipped and that began with a model of no stage.
        origin: where the section's values stand.
        whole: where the stage's own values stand.
    """

    name: str
    number: int
    kind: Kind
    folder: Path
    section: Recipe | Pipeline
    data: Mapping[str, Any]
    takes: Mapping[str, str]
    carry: Sequence[str]
    skip: bool
    anew: bool
    origin: Origin
    whole: Origin

    @property
    def recipe(self) -> Recipe:
        """The recipe of a stage that trains or captures."""
        assert isinstance(self.section, Recipe)
        return self.section

    @property
    def trains(self) -> bool:
        return self.kind.does == "recipe"

    @property
    def left(self) -> Path:
        """What it leaves to later stages."""
        return self.folder / self.kind.leaves

    @property
    def before(self) -> str | None:
        """The stage that the student comes from."""
        return next((name for key, name in self.takes.items() if key.split(".")[0] == "student"), None)

    def read_with(self, paths: Mapping[str, str]) -> Recipe:
        """Return the recipe with other paths: `paths` says which stand for which."""
        return Recipe.model_validate(exchanged(self.data, paths))

    def explained(self, error: Exception) -> RecipeError:
        """Return what is wrong with the stage: every line with the stage and, where it names a key, its place."""
        lines = []
        for text in str(error).splitlines() or [type(error).__name__]:
            line = self.origin.placed(self.kind.section, text)[0]
            line = self.whole.placed(Stage, text)[0] if isinstance(line, str) else line
            lines.append(_of_stage(line if isinstance(line, Problem) else Problem("", text), self.name))
        return RecipeError(lines)


@dataclass(frozen=True)
class StagedRun:
    """A file of stages, read.

    Attributes:
        run_dir: folder of the whole.
        stages: in order.
    """

    run_dir: Path
    stages: Sequence[Planned]
    by_name: Mapping[str, Planned] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {stage.name: stage for stage in self.stages})

    @property
    def active(self) -> Iterator[Planned]:
        """The stages that are not skipped."""
        return (stage for stage in self.stages if not stage.skip)

    def takers(self, name: str) -> list[Planned]:
        """Return the stages that use what one leaves."""
        return [stage for stage in self.active if name in stage.takes.values()]


def load(path: str | Path, overrides: Sequence[str] = ()) -> StagedRun:
    """Read a file of stages.

    Args:
        path: a YAML file.
        overrides: `key=value`: of one stage (`NAME.training.max_steps=2`, `NAME.skip=true`), of the file
            (`run_dir=...`), or a key of a recipe, for every stage.

    Raises:
        RecipeError: a ValueError with every problem of the file, of its recipes and of the overrides.
    """
    document = read_mapping(path)
    own, of_stages, problems = _sorted(document.data, overrides)
    stages = load_section(Stages, path, own)
    planned: list[Planned] = []
    left: dict[str, Left] = {}
    for number, stage in enumerate(stages.stages):
        try:
            known = KINDS[stage.does].section.model_fields
            changes = [
                text for name, text in of_stages if name == stage.name or (name is None and _first(text) in known)
            ]
            reader = _Reader(stages, number, Path(path), Origin(document, ("stages", number)), left)
            planned.append(reader.read(changes))
        except RecipeError as error:
            problems += [_of_stage(problem, stage.name) for problem in error.problems]
            left.setdefault(stage.name, left_by(KINDS[stage.does], stages.run_dir / stage.name))
    if problems:
        raise RecipeError(problems)
    return StagedRun(stages.run_dir, planned)


def _of_stage(problem: Problem, name: str) -> Problem:
    return Problem(f"stage {name}: {problem.place}".removesuffix(": "), problem.message, problem.line)


def _sorted(data: Any, overrides: Sequence[str]) -> tuple[list[str], list[tuple[str | None, str]], list[Problem]]:
    """Return the overrides of the file, those of recipes with their stage (None: every one), and what is wrong."""
    listed = data.get("stages")
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in listed or [] if listed]
    own: list[str] = []
    of_stages: list[tuple[str | None, str]] = []
    problems = []
    for text in overrides:
        key, _, rest = text.partition(".")
        first = _first(text)
        if key in names and rest.partition("=")[0].split(".")[0] in Stage.model_fields:
            own.append(f"stages.{names.index(key)}.{rest}")
        elif key in names:
            of_stages.append((key, rest))
        elif first in Stages.model_fields:
            own.append(text)
        elif first in Recipe.model_fields:
            of_stages.append((None, text))
        else:
            known = [*map(str, names), *Stages.model_fields, *Recipe.model_fields]
            meant = suggestion(first, known) or f"; the stages are: {', '.join(map(str, names))}"
            problems.append(
                Problem(f"override {text!r}", f"no stage and no key of a recipe is called {first!r}{meant}")
            )
    return own, of_stages, problems


def _first(override: str) -> str:
    return override.partition("=")[0].partition(".")[0].strip()


@dataclass(frozen=True)
class _Reader:
    """Reads one stage.

    Attributes:
        left: what the stages before it leave.
    """

    stages: Stages
    number: int
    path: Path
    whole: Origin
    left: dict[str, Left]

    def read(self, changes: Sequence[str]) -> Planned:
        stage = self.stages.stages[self.number]
        kind, folder = KINDS[stage.does], self.stages.run_dir / stage.name
        said, origin, problems = self._changed(stage, kind, changes)
        names = [stage.name for stage in self.stages.stages[self.number :]]
        data, takes, anew = Links(self.left, names, origin, problems)(said)
        for key, below in kind.places.items():
            if key != "teacher.path" or _cached(data.get("teacher")):  # of another teacher `check` says it
                data, _ = replaced(data, tuple(key.split(".")), str(folder / below))
        if stage.skip:
            before = next((taken for key, taken in takes.items() if key.split(".")[0] == "student"), None)
            student = before and self.stages.run_dir / before / "student"
            self.left[stage.name] = left_by_skipped(kind, data.get("student"), student or None)
        else:
            self.left[stage.name] = left_by(kind, folder, said.get("teacher"))
        section: Any = validated(kind.section, data, origin, problems)
        return Planned(
            *(stage.name, self.number, kind, folder, section, data, takes, tuple(stage.carry), stage.skip, anew),
            *(origin, self.whole),
        )

    def _changed(self, stage: Stage, kind: Kind, changes: Sequence[str]) -> tuple[Any, Origin, list[Problem]]:
        """Return what the stage runs as plain data with all its changes, where it stands, and what is wrong."""
        places: dict[KeyPath, str] = {}
        said = getattr(stage, kind.does)
        if isinstance(said, dict):
            data: Any = said
            origin = Origin(self.whole.document, (*self.whole.under, kind.does), places)
            problems = [
                origin.problem(keys, _set_by_the_run(kind, keys))
                for keys in (tuple(key.split(".")) for key in kind.places)
                if _has(data, keys)
            ]
        else:
            document = read_mapping(self.path.parent / said)
            data, origin, problems = document.data, Origin(document, (), places), list(document.problems)
        set_ = [
            (f"{self._line('set', key)}: set.{key}", tuple(key.split(".")), value) for key, value in stage.set.items()
        ]
        for text in changes:
            try:
                set_.append((f"override {text!r}", *parse_override(text)))
            except ValueError as error:
                problems.append(Problem(f"override {text!r}", str(error)))
        for place, keys, value in set_:
            try:
                if ".".join(keys) in kind.places:
                    raise ValueError(_set_by_the_run(kind, keys))
                data, path = replaced(data, keys, value)
                places[path] = place
            except ValueError as error:
                problems.append(Problem(place, str(error)))
        return data, origin, problems

    def _line(self, *keys: Any) -> str:
        document = self.whole.document
        return f"{document.name}:{document.line((*self.whole.under, *keys))}"


def _set_by_the_run(kind: Kind, keys: KeyPath) -> str:
    below = "/".join(["RUN_DIR/NAME", *filter(None, [kind.places[dotted(keys)]])])
    return f"is {below} in a run of stages: leave it out"


def _cached(teacher: Any) -> bool:
    return isinstance(teacher, dict) and teacher.get("name") == "cached"


def _has(data: Any, keys: KeyPath) -> bool:
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True
