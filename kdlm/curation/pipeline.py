"""Pipeline: sources, a list of steps, and a folder that keeps what each step made."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet
from datasets import Dataset
from pydantic import Field, model_validator

from kdlm.curation.corrupt import Corrupt
from kdlm.curation.cut import Cut
from kdlm.curation.divergence import Divergence
from kdlm.curation.entity_questions import EntityQuestions
from kdlm.curation.fall_back import FallBack
from kdlm.curation.filter import Filter
from kdlm.curation.generate import Generate, digest
from kdlm.curation.pairs import Pairs
from kdlm.curation.rows import read
from kdlm.curation.score import Score
from kdlm.curation.step import Counts, Desk
from kdlm.curation.tasks import Tasks
from kdlm.curation.thoughts import Thoughts
from kdlm.curation.verify import Verify
from kdlm.data.sections import Source
from kdlm.disk import write_bytes, write_text
from kdlm.section import Section
from kdlm.section_loader import suggestion
from kdlm.writers import AnyWriter

AnyStep = Annotated[
    Generate
    | Verify
    | Filter
    | Pairs
    | Corrupt
    | Score
    | Divergence
    | Cut
    | FallBack
    | Tasks
    | Thoughts
    | EntityQuestions,
    Field(discriminator="name"),
]
"""A step of a pipeline, chosen by its `name`."""

ROWS, ABOUT = "rows.parquet", "about.json"


class Pipeline(Section):
    """From sources to rows that are trained on."""

    sources: list[Source] = Field(min_length=1)
    """Where the first rows come from: prompts, conversations, completions of others."""
    writers: dict[str, AnyWriter] = {}
    """The models that steps ask, by name."""
    steps: list[AnyStep] = Field(min_length=1)
    """What is done to the rows, one after another."""
    output: Path
    """Folder of `rows.parquet`, `about.json`, what each step made, and every answer that a writer gave."""
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
        return self


def run(pipeline: Pipeline, say: Callable[[str], None] = print) -> Dataset:
    """Run what is not done yet, and return the last step's rows.

    The output of a step is kept under a hash of its settings and of all that came before it, so that a run that was
    killed goes on where it was, and one that is done does nothing. Outputs of other settings stay.
    """
    counts = Counts()
    rows, digests = read(pipeline.sources, counts)
    said = {"sources": [source.model_dump(mode="json") for source in pipeline.sources], "content": digests}
    name, done = digest(said), [_told("sources", rows, counts, say)]
    desk = Desk(pipeline.writers, pipeline.output, pipeline.seed)
    try:
        for number, step in enumerate(pipeline.steps, 1):
            asked = {key: pipeline.writers[by].identity() for key, by in step.asks().items()}
            name = digest([name, step.model_dump(mode="json"), asked, pipeline.seed])
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
    _keep(pipeline.output, rows, {"pipeline": pipeline.model_dump(mode="json"), "steps": done})
    say(f"{pipeline.output / ROWS}: {len(rows)} rows")
    return rows


def _told(step: str, rows: Dataset, counts: Counts, say: Callable[[str], None]) -> dict[str, Any]:
    """Say what became of a step, and return it."""
    for line in [f"{step}: {len(rows)} rows", *(f"  {line}" for line in counts.lines())]:
        say(line)
    return {"step": step, "rows": len(rows), **asdict(counts)}


def _keep(folder: Path, rows: Dataset, about: dict[str, Any]) -> None:
    """Write rows, and then what is said of them: where that is, the rows are whole."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(rows.with_format("arrow")[:], sink)  # pyright: ignore[reportArgumentType]
    write_bytes(folder / ROWS, sink.getvalue().to_pybytes())
    write_text(folder / ABOUT, json.dumps(about, indent=2, default=str))
