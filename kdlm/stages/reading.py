"""From the file of a run of several stages to one recipe for each, with where every value of it stands."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlm.recipe import Recipe
from kdlm.section_loader import Origin, load_section, parse_override, read_mapping, replaced, suggestion, validated
from kdlm.stages.sections import WORD, Stage, Stages
from kdlm.yaml_document import KeyPath, Problem, RecipeError, dotted


@dataclass(frozen=True)
class Planned:
    """One stage to run.

    Attributes:
        name: of the stage.
        number: its place, from 0.
        recipe: what it runs, with folders in place of the names of stages.
        data: the same as plain data.
        takes: dotted key of the recipe -> the stage whose student is there: the one that was run, where the named one
            is skipped.
        carry: roles whose weights go on.
        skip: whether it is left out.
        anew: whether the student would come from a stage that is skipped and that began with a model of no stage.
        origin: where the recipe's values stand.
        whole: where the stage's own values stand.
    """

    name: str
    number: int
    recipe: Recipe
    data: Mapping[str, Any]
    takes: Mapping[str, str]
    carry: Sequence[str]
    skip: bool
    anew: bool
    origin: Origin
    whole: Origin

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def before(self) -> str | None:
        """The stage that the student comes from."""
        return next((name for key, name in self.takes.items() if key.split(".")[0] == "student"), None)

    def read_with(self, folders: Mapping[str, str]) -> Recipe:
        """Return the recipe with other folders: `folders` says which stand for which."""
        return Recipe.model_validate(exchanged(self.data, folders))

    def explained(self, error: Exception) -> RecipeError:
        """Return what is wrong with the stage: every line with the stage and, where it names a key, its place."""
        lines = []
        for text in str(error).splitlines() or [type(error).__name__]:
            line = self.origin.placed(Recipe, text)[0]
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
        """Return the stages that use the student of one."""
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
    left: dict[str, Any] = {}
    for number, stage in enumerate(stages.stages):
        try:
            changes = [text for name, text in of_stages if name in (None, stage.name)]
            reader = _Reader(stages, number, Path(path), Origin(document, ("stages", number)), left)
            planned.append(reader.read(changes))
        except RecipeError as error:
            problems += [_of_stage(problem, stage.name) for problem in error.problems]
            left.setdefault(stage.name, str(stages.run_dir / stage.name / "student"))
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
        first = key.split("=")[0].strip()
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


@dataclass(frozen=True)
class _Reader:
    """Reads one stage.

    Attributes:
        left: what the stages before it leave: the folder of a student as text, or, of one that is skipped and began
            with no stage's student, the keys of the student that it would have begun with.
    """

    stages: Stages
    number: int
    path: Path
    whole: Origin
    left: dict[str, Any]

    def read(self, changes: Sequence[str]) -> Planned:
        stage = self.stages.stages[self.number]
        data, origin, problems = self._changed(stage, changes)
        data, takes, anew = self._linked(data, origin, problems)
        data = {**data, "run_dir": str(self.stages.run_dir / stage.name)}
        student = data.get("student")
        before = next((name for key, name in takes.items() if key.split(".")[0] == "student"), None)
        if not stage.skip:
            self.left[stage.name] = str(self.stages.run_dir / stage.name / "student")
        elif before is not None:
            self.left[stage.name] = str(self.stages.run_dir / before / "student")
        else:
            self.left[stage.name] = {key: value for key, value in dict(student or {}).items() if key != "lora"}
        recipe = validated(Recipe, data, origin, problems)
        return Planned(
            stage.name, self.number, recipe, data, takes, tuple(stage.carry), stage.skip, anew, origin, self.whole
        )

    def _changed(self, stage: Stage, changes: Sequence[str]) -> tuple[dict[str, Any], Origin, list[Problem]]:
        """Return the stage's recipe as plain data with all its changes, where it stands, and what is wrong."""
        places: dict[KeyPath, str] = {}
        if isinstance(stage.recipe, dict):
            data: Any = stage.recipe
            origin = Origin(self.whole.document, (*self.whole.under, "recipe"), places)
            problems = []
            if "run_dir" in data:
                problems.append(origin.problem(("run_dir",), "is RUN_DIR/NAME in a run of stages: leave it out"))
        else:
            document = read_mapping(self.path.parent / stage.recipe)
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
                if keys[0] == "run_dir":
                    raise ValueError("is RUN_DIR/NAME in a run of stages: leave it out")
                data, path = replaced(data, keys, value)
                places[path] = place
            except ValueError as error:
                problems.append(Problem(place, str(error)))
        return data, origin, problems

    def _line(self, *keys: Any) -> str:
        document = self.whole.document
        return f"{document.name}:{document.line((*self.whole.under, *keys))}"

    def _linked(self, data: Any, origin: Origin, problems: list[Problem]) -> tuple[Any, dict[str, str], bool]:
        """Return the data with folders in place of `stage:NAME`, which stage's student each key has, and `anew`."""
        takes: dict[str, str] = {}
        anew = False
        names = [stage.name for stage in self.stages.stages]
        for path, name in list(_named(data)):
            if name not in self.left:
                why = "comes later" if name in names[self.number + 1 :] else "is this one" if name in names else ""
                meant = suggestion(name, list(self.left)) or f"; before this one: {', '.join(self.left) or 'none'}"
                said = (
                    f"the stage {name!r} {why}: a stage takes what earlier ones leave"
                    if why
                    else f"no stage {name!r}{meant}"
                )
                problems.append(origin.problem(path, said))
                continue
            left = self.left[name]
            if isinstance(left, str):
                data, _ = replaced(data, tuple(map(str, path)), left)
                takes[dotted(path)] = Path(left).parent.name
            elif path == ("student", "path"):
                own = {key: value for key, value in data["student"].items() if key not in ("name", "path")}
                data, anew = {**data, "student": {**left, **own}}, True
            else:
                problems.append(
                    origin.problem(
                        path, f"the stage {name!r} is skipped and began with no stage's student: name a model"
                    )
                )
        return data, takes, anew


def _named(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and the name of every stage that is named in plain data."""
    if isinstance(data, str) and data.startswith(WORD):
        yield path, data.removeprefix(WORD)
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        yield from _named(child, (*path, key))


def exchanged(data: Any, words: Mapping[str, str]) -> Any:
    """Return plain data with some strings in place of others."""
    if isinstance(data, Mapping):
        return {key: exchanged(value, words) for key, value in data.items()}
    if isinstance(data, list):
        return [exchanged(value, words) for value in data]
    return words.get(data, data) if isinstance(data, str) else data
