"""Step: one stage of a pipeline, from rows to rows; and the desk that it works at."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from kdlm.data.report import EXAMPLES, Unused
from kdlm.section import Section
from kdlm.writers import Writer, WriterSection

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What became of the rows of a step, by kind: how many, and the first of them.

    Attributes:
        figures: other numbers that the step wants to be read.
    """

    kinds: dict[str, Unused] = field(default_factory=dict)
    figures: dict[str, float | int | str] = field(default_factory=dict)

    def note(self, kind: str, place: str, count: int = 1) -> None:
        """Count a row of this kind, and remember where it is; the first of a kind is logged."""
        found = self.kinds.setdefault(kind, Unused())
        if not found.count:
            log.info("%s: %s (others like it are only counted)", kind, place)
        found.count += count
        if len(found.examples) < EXAMPLES:
            found.examples.append(place)

    def lines(self) -> list[str]:
        """Return the counts as lines of text."""
        lines = [f"{name}: {_said(value)}" for name, value in self.figures.items()]
        for kind, found in self.kinds.items():
            more = "; ..." if found.count > len(found.examples) else ""
            lines.append(f"{kind}: {found.count} rows, {'; '.join(found.examples)}{more}")
        return lines


def _said(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Desk:
    """What a step works with beside its rows.

    Attributes:
        writers: the pipeline's models that write, by name. They are opened when first asked.
        folder: where a step keeps work that is to outlive a kill; None where nothing is kept.
        seed: of the pipeline.
        counts: what the step tells of its rows.
    """

    writers: Mapping[str, WriterSection] = field(default_factory=dict)
    folder: Path | None = None
    seed: int = 0
    counts: Counts = field(default_factory=Counts)
    opened: dict[str, Writer] = field(default_factory=dict)

    def writer(self, name: str) -> Writer:
        """Return an opened writer. Raises ValueError where it cannot be opened."""
        if name not in self.opened:
            self.opened[name] = self.writers[name].open(f"writers.{name}")
        return self.opened[name]

    def close(self) -> None:
        """Close the writers."""
        for writer in self.opened.values():
            writer.close()
        self.opened.clear()


class Step(Section):
    """One stage of a pipeline: a pure function of its rows, its settings and, where it asks a model, that model."""

    def asks(self) -> dict[str, str]:
        """Return the writers that the step asks, as key -> name."""
        return {}

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        """Return the rows of the next step.

        Columns that the step does not own stay as they are. Raises ValueError where a column that it reads is missing.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what its rows depend on, as plain data."""
        return self.model_dump(mode="json")

    def leaves(self, before: list[str]) -> list[str] | None:
        """Return the columns of its rows, given those of the rows before it; None where it cannot say.

        Raises ValueError where a column that it reads is missing: before a model is asked.
        """
        return None

    def __call__(self, rows: Dataset) -> Dataset:
        """Run the step by itself."""
        return self.run(rows, Desk())

    def describe(self) -> str:
        """Return the name a reader knows this step by."""
        return self.name  # type: ignore[attr-defined]


def lacks(have: Sequence[str], *columns: str, by: str) -> None:
    """Raise ValueError where a column is not among those that there are."""
    for column in columns:
        if column not in have:
            raise ValueError(f"{by}: no column {column!r} in its rows, which have {', '.join(have)}")


def digest(value: Any) -> str:
    """Return a hash of plain data: 16 hexadecimal digits."""
    said = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(said.encode(errors="replace")).hexdigest()[:16]


def as_prompt(text: str) -> str | list[dict[str, Any]]:
    """Return a prompt as a model is asked: a column holds messages as JSON text. Other JSON is text."""
    if text.startswith("[{"):
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if all(isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one for one in said):
            return said
    return text
