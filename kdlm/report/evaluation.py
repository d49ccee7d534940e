"""What a job of `kdlm eval` measured, as a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlm.estimates import SIGNIFICANT, finite
from kdlm.report.comparison import heading, with_error
from kdlm.report.markup import Html, element, joined, table
from kdlm.report.numbers import plain
from kdlm.report.run import Run


def read_job(path: Path) -> dict[str, Any] | None:
    """Return the results of the job that a file or folder holds, or None where it holds none."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"models", "tasks"} <= found.keys() else None


def jobs_of(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return the results that lie in run folders as `evaluation/results.json`, by run."""
    found = {run.name: read_job(run.path / "evaluation") for run in runs}
    return {name: job for name, job in found.items() if job is not None}


def evaluation(jobs: dict[str, dict[str, Any]]) -> Html:
    """Return a table of each job: tasks and distillation metrics down, models across."""
    return joined(_job(name, job) for name, job in jobs.items())


def _job(name: str, job: dict[str, Any]) -> Html:
    models = list(job["models"])
    rows: list[list[Any]] = []
    for task, found in job["tasks"].items():
        for metric, figures in found["metrics"].items():
            way = {True: "↑", False: "↓"}.get(figures.get("higher_is_better"), "")
            against = figures.get("against_baseline") or {}
            cells = [_figure(figures["models"].get(model), against.get(model)) for model in models]
            rows.append([f"{task}: {metric} {way}", f"{found.get('samples', '')}", *cells])
    heads = [_model(model, job["models"][model]) for model in models]
    said = f"± standard error; * differs from the baseline (p < {SIGNIFICANT}, paired); ↑ more is better, ↓ less."
    parts = [table(["task", "samples", *heads], rows, name), element("p", said, class_="said")]
    measured = {model: each["metrics"] for model, each in (job.get("distillation") or {}).items()}
    sizes = {model: each.get("batch") or {} for model, each in (job.get("speed") or {}).items()}
    others = [("Against the teacher", "", measured)]
    for size in dict.fromkeys(size for each in sizes.values() for size in each):
        others.append(("Speed", f"batch {size}: ", {model: each.get(size, {}) for model, each in sizes.items()}))
    for title, before, found in others:
        names = dict.fromkeys(name for each in found.values() for name in each if name != "against_teacher")
        rows = [
            [joined([before, heading(name)]), *(with_error(found.get(model, {}).get(name), name) for model in models)]
            for name in names
        ]
        parts += [table(["", *heads], rows, title)] if rows else []
    return joined(parts)


def _model(name: str, about: dict[str, Any]) -> Html:
    return joined([name, " ", element("small", about.get("role", ""))])


def _figure(found: dict[str, Any] | None, against: dict[str, Any] | None) -> Any:
    value = finite((found or {}).get("value"))
    if value is None:
        return "–"  # noqa: RUF001
    error = finite((found or {}).get("error"))
    p_value = finite((against or {}).get("p_value"))
    star = "*" if p_value is not None and p_value < SIGNIFICANT else ""
    return joined([f"{plain(value)}{star}", element("small", "" if error is None else f" ± {plain(error)}")])
