"""Pipeline: sources, a list of steps, and a folder that keeps what each step made."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset
from filelock import FileLock, Timeout
from pydantic import Field, model_validator

from kdlm import __version__
from kdlm.curation.generate import digest
from kdlm.curation.report import report
from kdlm.curation.rows import read
from kdlm.curation.step import Counts, Desk
from kdlm.curation.steps import AnyStep
from kdlm.data.sections import Source
from kdlm.disk import write_text
from kdlm.section import Section
from kdlm.section_loader import suggestion
from kdlm.writers import AnyWriter

ROWS, ABOUT, REPORT = "rows.parquet", "about.json", "report.md"
ROWS_AT_ONCE = 16384
"""Rows of a group of the parquet file."""


class Pipeline(Section):
    """From sources to rows that are trained on."""

    sources: list[Source] = Field(min_length=1)
    """Where the first rows come from: prompts, conversations, completions of others."""
    writers: dict[str, AnyWriter] = {}
    """The models that steps ask, by name."""
    steps: list[AnyStep] = Field(min_length=1)
    """What is done to the rows, one after another."""
    output: Path
    """Folder of `rows.parquet`, `about.json`, `report.md`, what each step made, and every answer that a writer gave."""
    seed: int = Field(0, ge=0)
    """Seed of everything that is drawn at random."""

    @model_validator(mode="after")
    def _known_writers(self) -> "Pipeline":
        for number, step in enumerate(self.steps):
            for key, name in step.asks().items():
                if name not in self.writers:
                    known = ", ".join(self.writers) or "none"
                    meant = suggestion(name, list(self.writers)) or f"; there are: {known}"
                    raise ValueError(f"steps.{number}.{key}: no writer {name!r}{meant}")
        for number, source in enumerate(self.sources):
            if source.weight is not None:
                raise ValueError(
                    f"sources.{number}.weight: a pipeline reads every row once: remove it (`limit` takes a part)"
                )
        return self


def check(pipeline: Pipeline) -> list[str]:
    """Return what a run would begin with, and ask no model. Raises ValueError where it would fail for a column."""
    return looked_at(pipeline)[0]


def looked_at(pipeline: Pipeline) -> tuple[list[str], list[str] | None]:
    """Return what `check` does, and the columns of the rows that a run would make; None where they cannot be told."""
    counts = Counts()
    rows, _ = read(pipeline.sources, counts)
    columns = _columns(pipeline, rows)
    said = "cannot be told before it has run" if columns is None else ", ".join(columns)
    return [*_lines("sources", rows, counts), f"columns at the end: {said}"], columns


def run(pipeline: Pipeline, say: Callable[[str], None] = print) -> Dataset:
    """Run what is not done yet, and return the last step's rows.

    The output of a step is kept under a hash of its settings and of all that came before it, so that a run that was
    killed goes on where it was, and one that is done does nothing. Outputs of other settings stay. Rows of one step are
    in memory as Arrow tables, a step's in and out at a time.

    Raises ValueError where a step lacks a column, before a model is asked, and where another process works there.
    """
    pipeline.output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(pipeline.output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"output: {pipeline.output}: another process works there: wait for it, or end it") from None
    try:
        return _run(pipeline, say)
    except KeyboardInterrupt:
        say("interrupted: what was answered is kept, and the same command goes on from there")
        raise
    finally:
        lock.release()


def _run(pipeline: Pipeline, say: Callable[[str], None]) -> Dataset:
    counts = Counts()
    rows, digests = read(pipeline.sources, counts)
    _columns(pipeline, rows)
    said = {"sources": [source.model_dump(mode="json") for source in pipeline.sources], "content": digests}
    name, done = digest(said), [_told("sources", rows, counts, say)]
    desk = Desk(pipeline.writers, pipeline.output, pipeline.seed)
    try:
        for number, step in enumerate(pipeline.steps, 1):
            asked = {key: pipeline.writers[by].identity() for key, by in step.asks().items()}
            name = digest([name, step.settings(), asked, pipeline.seed])
            folder = pipeline.output / "steps" / f"{number:02d}-{step.describe()}-{name}"
            desk.counts = Counts()
            if (folder / ABOUT).is_file():
                rows = Dataset(pyarrow.parquet.read_table(folder / ROWS))
                done.append(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
                say(f"{step.describe()}: {len(rows)} rows, made before")
                continue
            rows = step.run(rows, desk)
            done.append(_told(step.describe(), rows, desk.counts, say))
            _keep(folder, rows, done[-1])
    finally:
        desk.close()
    about = {"kdlm": __version__, "pipeline": pipeline.model_dump(mode="json"), "content": digests, "steps": done}
    _keep(pipeline.output, rows, about)
    write_text(pipeline.output / REPORT, report(done, rows))
    say(f"{pipeline.output / ROWS}: {len(rows)} rows")
    return rows


def _columns(pipeline: Pipeline, rows: Dataset) -> list[str] | None:
    """Return the last step's columns, None where a step cannot say. Raises ValueError where one lacks a column."""
    columns: list[str] | None = rows.column_names
    for number, step in enumerate(pipeline.steps):
        if columns is None:
            return None
        try:
            columns = step.leaves(columns)
        except ValueError as error:
            raise ValueError(f"steps.{number}: {error}") from error
    return columns


def _lines(step: str, rows: Dataset, counts: Counts) -> list[str]:
    return [f"{step}: {len(rows)} rows", *(f"  {line}" for line in counts.lines())]


def _told(step: str, rows: Dataset, counts: Counts, say: Callable[[str], None]) -> dict[str, Any]:
    """Say what became of a step, and return it."""
    for line in _lines(step, rows, counts):
        say(line)
    return {"step": step, "rows": len(rows), **asdict(counts)}


def _keep(folder: Path, rows: Dataset, about: dict[str, Any]) -> None:
    """Write rows, and then what is said of them: where that is, the rows are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{ROWS}.tmp"
    try:
        with open(temporary, "wb") as file:
            schema = rows.features.arrow_schema
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                for start in range(0, len(rows), ROWS_AT_ONCE):
                    some: Any = rows.with_format("arrow")[start : start + ROWS_AT_ONCE]
                    writer.write_table(some.cast(schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / ROWS)
        write_text(folder / ABOUT, json.dumps(about, indent=2, default=str))
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{folder}: {error.strerror or error}: its rows could not be written; what models answered is kept: mend "
            "that (free space) and run the same command",
        ) from error
