"""How far a run of stages has come, and whether what lies there is still what later stages were made of."""

from collections.abc import Iterator

from kdlm import checkpoints
from kdlm.run_folder import changes
from kdlm.section_loader import load_section
from kdlm.stages import records
from kdlm.stages.reading import Planned, StagedRun
from kdlm.stages.records import Record
from kdlm.yaml_document import Problem, RecipeError

WHOLE = "stages.yaml"


def begun(stage: Planned) -> bool:
    """Whether there is anything of the stage."""
    return (stage.folder / stage.kind.file).exists() or bool(checkpoints.finished(stage.folder))


def ended(run: StagedRun, *, resume: bool) -> dict[str, Record]:
    """Return the records of the stages that have ended, by name.

    Raises ValueError when the folder holds a run that was not asked to be resumed; RecipeError, with every reason, when
    what lies there does not belong together: an ended stage whose recipe, student, rows or signals are others now, or a
    stage that was made of others than those that lie there.
    """
    if not resume:
        if any((run.run_dir / name).exists() for name in (WHOLE, "recipe.yaml")) or any(map(begun, run.active)):
            raise ValueError(
                f"run_dir: {run.run_dir} already holds a run; go on with --resume or choose another folder"
            )
        return {}
    found = {stage.name: record for stage in run.active if (record := records.read(stage.folder)) is not None}
    done = {name: record for name, record in found.items() if record.leaves is not None}
    problems: list[Problem] = []
    for stage in run.active:
        if stage.name in done:
            problems += [*_changed(run, stage), *_damaged(stage, done[stage.name])]
        if stage.name in found:
            problems += _of_others(run, stage, found[stage.name], done)
    if problems:
        raise RecipeError(problems)
    return done


def _changed(run: StagedRun, stage: Planned) -> Iterator[Problem]:
    """Yield what is another value in an ended stage's recipe or pipeline now."""
    if not (stage.folder / stage.kind.file).is_file():
        text = f"name: {stage.folder} holds a stage of this name that did something else: choose another run_dir, or "
        yield from stage.explained(ValueError(f"{text}delete {_stale(run, stage)} to run it")).problems
        return
    before = load_section(stage.kind.section, stage.folder / stage.kind.file)
    for key, (old, new) in changes(before, stage.section).items():
        if not key.startswith(("run_dir", "guards", "teacher.placement", "teacher.device", "teacher.batch_size")):
            text = (
                f"{key}: {old!r} -> {new!r}, but the stage has ended with the old value: put it back, choose another "
            )
            yield from stage.explained(
                ValueError(f"{text}run_dir, or delete {_stale(run, stage)} to run it again")
            ).problems


def _damaged(stage: Planned, record: Record) -> Iterator[Problem]:
    try:
        record.verify(stage.folder)
    except ValueError as error:
        yield from stage.explained(error).problems


def _of_others(run: StagedRun, stage: Planned, record: Record, done: dict[str, Record]) -> Iterator[Problem]:
    """Yield where a stage was made of what does not lie there any more."""
    for key, took in [*record.takes.items(), *((f"carry: {role}", took) for role, took in record.carried.items())]:
        source = done.get(took["stage"])
        there = None if source is None else source.fingerprint if key in record.takes else source.left(key[7:])
        if there != took["fingerprint"]:
            why = "which has to be run again" if source is None else "which lies there no more"
            text = f"{key}: made of what stage {took['stage']} had left, {why}: delete {_stale(run, stage)} to go on"
            yield from stage.explained(ValueError(text)).problems


def _stale(run: StagedRun, stage: Planned) -> str:
    """Return the folders of a stage and of all that were made of it."""
    stale = [stage]
    for one in run.active:
        if any(source.name in one.takes.values() for source in stale) and one not in stale and begun(one):
            stale.append(one)
    return ", ".join(str(one.folder) for one in stale)
