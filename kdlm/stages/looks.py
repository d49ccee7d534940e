"""`kdlm check` of a file of stages: each of them, with stand-ins for what earlier stages will leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from kdlm import check as single
from kdlm.capture import section_of
from kdlm.curation import Pipeline
from kdlm.curation.pipeline import looked_at
from kdlm.data import DataSection
from kdlm.recipe import Recipe
from kdlm.roles import Trainable
from kdlm.stages import stand_ins
from kdlm.stages.reading import Planned, StagedRun
from kdlm.stages.sections import WORD
from kdlm.teachers import CachedTeacherSection
from kdlm.yaml_document import Problem, RecipeError

LATER = "its rows are known when it has run"


def check(run: StagedRun) -> list[str]:
    """Validate every stage and return a line for each thing that was looked at, with its stage.

    What an earlier stage will leave is looked at by what is known of it: a student's configuration and tokenizer, the
    columns of rows, whose signals they are. Where that cannot be had yet the stages that take it are not looked at, and
    say so.

    Raises RecipeError with all problems of all stages.
    """
    lines: list[str] = []
    problems: list[Problem] = []
    with looks(run) as found:
        for look in found:
            stage = look.stage
            if look.why:
                lines.append(f"stage {stage.name}: not looked at here ({look.why})")
                continue
            try:
                said = [*_said(run, look), *_carried(run, stage), *_loose_end(run, stage)]
                lines += [f"stage {stage.name}: {look.shown(line)}" for line in said]
            except ValueError as error:
                problems += stage.explained(ValueError(look.shown(str(error)))).problems
    lines += [f"stage {stage.name}: skipped" for stage in run.stages if stage.skip]
    if problems:
        raise RecipeError(problems)
    return lines


@dataclass(frozen=True)
class Look:
    """A stage that is looked at before the earlier ones have run.

    Attributes:
        names: stand-ins -> the names of the stages for which they stand.
        recipe: what it trains or captures by, with stand-ins; None of a pipeline.
        why: why it cannot be looked at yet, or nothing.
    """

    stage: Planned
    names: dict[str, str]
    recipe: Recipe | None = None
    why: str = ""

    @cached_property
    def pipeline(self) -> tuple[list[str], list[str] | None]:
        """What is said of a pipeline, and the columns that it will leave. Raises ValueError where it cannot work."""
        assert isinstance(self.stage.section, Pipeline)
        return looked_at(self.stage.section)

    def shown(self, text: str) -> str:
        """Return a text with the names of stages in place of stand-ins."""
        for path, name in self.names.items():
            text = text.replace(path, name)
        return text


@contextmanager
def looks(run: StagedRun, *, rows: bool = True) -> Iterator[Iterator[Look]]:
    """Give every stage that is run, in order; `rows`: with stand-ins for rows, for which sources are read."""
    with TemporaryDirectory() as temporary:
        yield _looks(run, Path(temporary), rows)


def _looks(run: StagedRun, temporary: Path, rows: bool) -> Iterator[Look]:
    instead: dict[str, str] = {}
    names: dict[str, str] = {}
    lacking: dict[str, str] = {}
    for stage in run.active:
        taken = [run.by_name[name] for name in stage.takes.values()]
        why = next((f"{WORD}{one.name}: {lacking[one.name]}" for one in taken if one.name in lacking), "")
        recipe = stage.read_with(instead) if stage.kind.section is Recipe and not why else None
        by_columns = recipe is not None and isinstance(recipe.data, DataSection)
        if rows and not why and not by_columns:
            of_rows = (one.name for one in taken if one.kind.section is Pipeline and str(one.left) in instead)
            why = next((f"{WORD}{name}: {LATER}" for name in of_rows), "")
        yield (look := Look(stage, names, None if why else recipe, why))
        if why:
            lacking[stage.name] = why
        elif not stage.left.exists():
            stand_in = temporary / stage.name / stage.kind.leaves
            if why := _stand_in(look, stand_in, rows):
                lacking[stage.name] = look.shown(why)
            instead[str(stage.left)], names[str(stand_in)] = str(stand_in), f"{WORD}{stage.name}"


def _stand_in(look: Look, path: Path, rows: bool) -> str:
    """Make the stand-in for what a stage will leave; return why it cannot be. Signals need none."""
    if look.recipe is None:
        if not rows:
            return ""
        try:
            columns = look.pipeline[1]
        except ValueError as error:  # said of the stage itself already
            return str(error)
        if columns is None:
            return LATER
        stand_ins.of_rows(columns, path)
        return ""
    return stand_ins.of_student(look.recipe.student, path) if look.stage.trains else ""


def _said(run: StagedRun, look: Look) -> Iterator[str]:
    """Look at what a stage does as its own verb would."""
    stage, recipe = look.stage, look.recipe
    if recipe is None:
        yield from look.pipeline[0]
        return
    if not stage.trains:
        section_of(recipe)
    for line in single.check(recipe):
        if " is not captured yet: " not in line:
            yield line
    if not stage.trains:
        yield f"teacher: its signals are captured into {stage.left}"
    for name in stage.takes.values():
        yield from _signals(recipe, run.by_name[name])


def _signals(recipe: Recipe, source: Planned) -> Iterator[str]:
    """Compare what a teacher reads with the capture of an earlier stage."""
    teacher = recipe.teacher
    if source.kind.does != "capture" or not isinstance(teacher, CachedTeacherSection):
        return
    theirs = section_of(source.recipe).format
    if theirs != teacher.format:
        raise ValueError(
            f"teacher.format: {WORD}{source.name} captures {theirs!r}, and {teacher.format!r} is read here"
        )
    yield f"teacher: signals of {WORD}{source.name}"


def _carried(run: StagedRun, stage: Planned) -> Iterator[str]:
    """See that the roles that go on are trained by both methods."""
    if not stage.carry:
        return
    if stage.anew:
        yield "note: carry: the stage that the student would come from is skipped: all begins anew"
        return
    if stage.before is None:
        raise ValueError(f"carry: the student comes from no earlier stage: student: {{path: '{WORD}NAME', ...}}")
    source = run.by_name[stage.before]
    for name, recipe in ((stage.name, stage.recipe), (source.name, source.recipe)):
        roles = recipe.method.build(recipe.losses, None).roles
        known = [role for role, kind in roles.items() if role != "student" and isinstance(kind, Trainable)]
        if unknown := [role for role in stage.carry if role not in known]:
            there = f"it trains {', '.join(known)}" if known else "it trains no network beside the student"
            raise ValueError(f"carry: {recipe.method.name} of stage {name} has no {unknown[0]!r}: {there}")
    yield f"carry: {', '.join(stage.carry)} of stage {source.name}"


def _loose_end(run: StagedRun, stage: Planned) -> Iterator[str]:
    """Note a stage of which nothing is made."""
    last = [one.name for one in run.active][-1]
    if stage.name != last and not run.takers(stage.name):
        left = {"recipe": "its student", "pipeline": "its rows", "capture": "its signals"}[stage.kind.does]
        yield f"note: no later stage takes {left} ({WORD}{stage.name})"
