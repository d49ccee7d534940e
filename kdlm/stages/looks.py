"""`kdlm check` of a file of stages: each recipe, with stand-ins for the students that earlier stages will leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kdlm import check as single
from kdlm.looking import opened
from kdlm.recipe import Recipe
from kdlm.roles import Trainable
from kdlm.stages.reading import Planned, StagedRun
from kdlm.stages.sections import WORD
from kdlm.yaml_document import Problem, RecipeError


def check(run: StagedRun) -> list[str]:
    """Validate every stage and return a line for each thing that was looked at, with its stage.

    What an earlier stage will leave is looked at by its configuration and tokenizer; where these cannot be had yet the
    stages that take it are not looked at, and say so.

    Raises RecipeError with all problems of all stages.
    """
    lines: list[str] = []
    problems: list[Problem] = []
    with recipes(run) as read:
        for stage, recipe, why, shown in read:
            if recipe is None:
                lines.append(f"stage {stage.name}: not looked at here ({why})")
                continue
            try:
                found = [*single.check(recipe), *_carried(run, stage), *_loose_end(run, stage)]
                lines += [f"stage {stage.name}: {shown(line)}" for line in found]
            except ValueError as error:
                problems += stage.explained(ValueError(shown(str(error)))).problems
    lines += [f"stage {stage.name}: skipped" for stage in run.stages if stage.skip]
    if problems:
        raise RecipeError(problems)
    return lines


@contextmanager
def recipes(run: StagedRun) -> Iterator[Iterator[tuple[Planned, Recipe | None, str, Any]]]:
    """Give the recipe of every stage that is run, to be looked at before the earlier ones have run.

    With it comes why there is none, and a function that names stages again in text in which they have stand-ins.
    """
    with TemporaryDirectory() as temporary:
        yield _recipes(run, Path(temporary))


def _recipes(run: StagedRun, temporary: Path) -> Iterator[tuple[Planned, Recipe | None, str, Any]]:
    stand_ins: dict[str, str] = {}
    names: dict[str, str] = {}
    lacking: dict[str, str] = {}

    def shown(text: str) -> str:
        for folder, name in names.items():
            text = text.replace(folder, name)
        return text

    for stage in run.active:
        missing = [name for name in stage.takes.values() if name in lacking]
        if missing:
            why = f"{WORD}{missing[0]}: {lacking[missing[0]]}"
            lacking[stage.name] = why
            yield stage, None, why, shown
            continue
        recipe = stage.read_with(stand_ins)
        yield stage, recipe, "", shown
        left, stand_in = stage.folder / "student", temporary / stage.name
        if left.is_dir():
            continue
        if why := _stand_in(recipe.student, stand_in):
            lacking[stage.name] = shown(why)
        stand_ins[str(left)], names[str(stand_in)] = str(stand_in), f"{WORD}{stage.name}"


def _stand_in(student: Any, folder: Path) -> str:
    """Write what is known of the student that a stage will leave, all but its weights; return why it cannot be."""
    if not hasattr(student, "tokenizer") or not callable(getattr(student, "config", None)):
        return f"what the stage leaves of {student.name} is known when it has run"
    try:
        found, why = opened(lambda: (student.config(), student.tokenizer()), student)
    except ValueError as error:  # said of the stage itself already
        return str(error)
    if found is None:
        return why
    config, tokenizer = found
    if getattr(student, "dtype", "auto") != "auto":
        config.dtype = getattr(torch, student.dtype)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if hasattr(student, "processor"):
        student.processor().save_pretrained(folder)
    return ""


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
    """Note a stage of whose student nothing is made."""
    last = [one.name for one in run.active][-1]
    if stage.name != last and not run.takers(stage.name):
        yield f"note: no later stage takes its student ({WORD}{stage.name})"
