"""Report: what became of the rows of a pipeline, as a page to read."""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset

from kdlm.markdown import table

SHOWN = 3
"""Rows that are shown."""
CHARACTERS = 400
"""Characters of a value that are shown."""
HISTOGRAM = "prompts by pass rate"
WIDTH = 40


def report(steps: Sequence[dict[str, Any]], rows: Dataset) -> str:
    """Return a page in Markdown.

    Args:
        steps: what each step told, the sources first, as it stands in `about.json`.
        rows: of the last step.
    """
    return "\n\n".join(_parts(steps, rows)) + "\n"


def _parts(steps: Sequence[dict[str, Any]], rows: Dataset) -> Iterator[str]:
    yield "# What became of the rows"
    yield f"`rows.parquet` has {len(rows)} rows; every setting stands in `about.json`."
    before = ["", *(str(step["rows"]) for step in steps)]
    lines = [[step["step"], came, str(step["rows"])] for step, came in zip(steps, before, strict=False)]
    yield table(["step", "rows in", "rows out"], lines, words=1)
    for number, step in enumerate(steps):
        if step["figures"] or step["kinds"]:
            yield f"## {number}. {step['step']}" if number else f"## {step['step']}"
            yield from _told(step)
    if len(rows):
        yield "## Rows, such as"
        for number in sorted({part * (len(rows) - 1) // (SHOWN - 1) for part in range(SHOWN)}):
            row: Any = rows[number]
            values = [[name, _short(value)] for name, value in row.items() if value is not None]
            yield table([f"row {number}", ""], values)


def _told(step: dict[str, Any]) -> Iterator[str]:
    figures = {name: value for name, value in step["figures"].items() if name != HISTOGRAM}
    if figures:
        yield table(["figure", ""], [[name, _short(value)] for name, value in figures.items()])
    if HISTOGRAM in step["figures"]:
        bins = [one.rpartition(": ") for one in step["figures"][HISTOGRAM].split(", ")]
        most = max(int(count) for _, _, count in bins)
        bars = [[name, "#" * round(WIDTH * int(count) / most), count] for name, _, count in bins]
        yield table([HISTOGRAM, "", "prompts"], bars, words=2)
    if step["kinds"]:
        kinds = [[kind, "; ".join(found["examples"]), str(found["count"])] for kind, found in step["kinds"].items()]
        yield table(["kind", "such as", "rows"], kinds, words=2)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} ... ({len(text)} characters)"
