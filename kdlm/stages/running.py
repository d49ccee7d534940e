"""`kdlm train` of a file of stages: one after another, each resumable, in one process or on the same ranks.

Ranks share the units of a capture; a pipeline is run by the first one, and the others wait for its record.
"""

import gc
import json
import os
import time
from collections.abc import Mapping
from functools import partial, reduce
from operator import getitem
from typing import Any

import torch

from kdlm.capture import capture
from kdlm.curation import run as generate
from kdlm.curation.pipeline import ABOUT
from kdlm.disk import write_text
from kdlm.plan import settled
from kdlm.recipe import Recipe
from kdlm.role_checkpoints import HandOver
from kdlm.run_folder import RunFolder
from kdlm.stages import records
from kdlm.stages.kinds import spelled
from kdlm.stages.linking import exchanged
from kdlm.stages.looks import check
from kdlm.stages.progress import WHOLE, begun, ended
from kdlm.stages.reading import Planned, StagedRun
from kdlm.stages.records import Record
from kdlm.stages.sections import WORD
from kdlm.store import Store
from kdlm.train import Figures
from kdlm.train import train as train_one
from kdlm.yaml_document import Document, RecipeError, dump

_WAIT = 1.0
"""Seconds between two looks of a rank that waits for the rows of another."""


def train(run: StagedRun, *, resume: bool | str = False, figures: Figures | None = None) -> bool:
    """Run the stages that have not ended, and return whether a guard stopped one; the later ones are then not run.

    Args:
        run: what to run.
        resume: leave the stages that have ended as they are, after a look at their checksums, and go on in the one that
            was running from its newest checkpoint.
        figures: as of `kdlm.train.train`, for every stage.

    Raises RecipeError, before anything is written, when a stage cannot work or what lies there does not belong
    together; ValueError for a checkpoint to go on from, which a run of stages finds by itself.
    """
    if isinstance(resume, str):
        raise ValueError(
            f"run_dir: --resume takes no checkpoint here ({resume}): of the stage that was running the newest is taken"
        )
    writes = int(os.environ.get("RANK", "0")) == 0
    done = ended(run, resume=resume or not writes)  # the first rank may have begun before another looks
    notes = [line for line in check(run) if ": note: " in line]
    if writes:
        print("\n".join(notes), end="\n" if notes else "")
    stopped = False
    for stage in run.stages:
        if writes:
            print(_line(run, stage, stage.name in done), flush=True)
        if stage.skip or stage.name in done:
            continue
        if stopped := _run(run, stage, done, figures, writes=writes):
            break
    if writes:
        _write_results(run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return stopped


def _run(run: StagedRun, stage: Planned, done: dict[str, Record], figures: Figures | None, *, writes: bool) -> bool:
    """Run one stage, and add to the records what it left; return whether a guard stopped it."""
    record = _taken(stage, done)
    try:
        if stage.trains:
            _train(run, stage, record, figures)
        else:
            _make(run, stage, record, writes=writes)
    except RecipeError:
        raise
    except ValueError as error:
        raise stage.explained(error) from error
    gc.collect()  # the models of a stage are in circles of references
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if stage.trains and RunFolder(stage.folder).stopped:
        return True
    done[stage.name] = Record(record.takes, record.carried, records.leaves(stage.folder, stage.kind.leaves))
    if writes:
        done[stage.name].write(stage.folder)
    return False


def _train(run: StagedRun, stage: Planned, record: Record, figures: Figures | None) -> None:
    wanted = {role for taker in run.active if taker.before == stage.name for role in taker.carry}
    hand_over = HandOver(
        {role: run.by_name[took["stage"]].folder for role, took in record.carried.items()},
        sorted(wanted),
        partial(_begin, run, stage, record),
    )
    recipe, placement = settled(stage.recipe)
    train_one(recipe, resume=begun(stage), figures=figures, placement=placement, stage=hand_over)


def _make(run: StagedRun, stage: Planned, record: Record, *, writes: bool) -> None:
    """Make rows or signals. Each goes on by itself where it was stopped."""
    if writes:
        _begin(run, stage, record)
        write_text(stage.folder / stage.kind.file, spelled(stage.section))
    if isinstance(stage.section, Recipe):
        capture(stage.section)
    elif writes:
        generate(stage.section)
    else:
        while (found := records.read(stage.folder)) is None or found.leaves is None:
            time.sleep(_WAIT)


def _taken(stage: Planned, done: Mapping[str, Record]) -> Record:
    """Return the record of a stage that begins. Raises RecipeError where an earlier one has not left a role."""
    takes = {key: {"stage": name, "fingerprint": done[name].fingerprint} for key, name in stage.takes.items()}
    carried = {}
    before = stage.before or ""
    for role in stage.carry if before else ():
        fingerprint = done[before].left(role)
        if fingerprint is None:
            why = f"stage {before} has ended and left no {role!r}: what is carried must be said before it runs"
            raise stage.explained(ValueError(f"carry: {why}"))
        carried[role] = {"stage": before, "fingerprint": fingerprint}
    return Record(takes, carried)


def _begin(run: StagedRun, stage: Planned, record: Record) -> None:
    """Write what the whole is, and what the stage takes."""
    write_text(run.run_dir / WHOLE, spelled_out(run))
    record.write(stage.folder)


def spelled_out(run: StagedRun) -> str:
    """Write a run as one file of stages with every default; `load` reads it back as the same run."""
    words = {str(stage.left): f"{WORD}{stage.name}" for stage in run.active}
    stages = []
    for stage in run.stages:
        section: Any = exchanged(Document(spelled(stage.section), stage.name).data, words)
        for key in stage.kind.places:
            *above, last = key.split(".")
            del reduce(getitem, above, section)[last]
        stages.append({"name": stage.name, stage.kind.does: section, "carry": list(stage.carry), "skip": stage.skip})
    return dump({"run_dir": str(run.run_dir), "stages": stages})


def _line(run: StagedRun, stage: Planned, done: bool) -> str:
    """Return the line of the log that a stage begins with."""
    place = f"stage {stage.number + 1}/{len(run.stages)} {stage.name}"
    if stage.skip:
        return f"{place}: skipped"
    if done:
        return f"{place}: ended before, in {stage.folder}"
    taken = [f"{key.split('.')[0]} of {name}" for key, name in stage.takes.items()]
    taken += [f"{role} of {stage.before}" for role in stage.carry if stage.before is not None]
    return f"{place}: {', '.join([str(stage.folder), *taken])}"


def _write_results(run: StagedRun) -> None:
    """Write what every stage measured, or how much it made."""
    found = {stage.name: {"skipped": True} if stage.skip else _results(stage) for stage in run.stages}
    stages = {name: results for name, results in found.items() if results}
    write_text(run.run_dir / "results.json", json.dumps({"stages": stages}, indent=1))


def _results(stage: Planned) -> dict[str, Any]:
    """Return the figures of a stage; none where it has not run."""
    if not stage.left.exists() and not (stage.folder / "results.json").is_file():
        return {}
    if stage.trains:
        return json.loads((stage.folder / "results.json").read_text(encoding="utf-8"))
    if stage.kind.does == "capture":
        store = Store(stage.left)
        return {"sequences": len(store), "tokens": store.rows, "bytes": store.bytes}
    steps = json.loads((stage.folder / ABOUT).read_text(encoding="utf-8"))["steps"]
    return {"rows": steps[-1]["rows"], "steps": [{key: step[key] for key in ("step", "rows")} for step in steps]}
