"""`kdlm compare`: every run, then the table."""

import json
import os
from collections.abc import Iterable

from rich.console import Console

from kdlm.compare import table
from kdlm.compare.planned import Planned, planned
from kdlm.compare.sections import Comparison
from kdlm.compare.workers import run_all
from kdlm.disk import write_text


def compare(comparison: Comparison, console: Console | None = None) -> list[table.Row]:
    """Make every run that is not there yet and write `results.json` and `results.md`; return what came of them.

    A run that fails is in the table with its last words, and the others go on. Started again, the command leaves
    finished runs as they are and goes on with those that were stopped.

    Raises ValueError, before anything is run, with all that is wrong with any of the recipes.
    """
    console = console or Console(soft_wrap=True)
    runs = planned(comparison)
    failed = made(runs, comparison, console)
    rows = table.gathered(runs, failed, next(iter(comparison.metrics)))
    written(rows, comparison)
    console.print(table.printed(rows, comparison))
    console.print(f"table: {comparison.output / 'results.md'}", highlight=False)
    return rows


def made(runs: Iterable[Planned], comparison: Comparison, console: Console) -> dict[str, str]:
    """Make what is missing of some runs, saying how each ended; return the last lines of those that failed."""
    runs = list(runs)
    there, ended = sum(run.finished for run in runs), 0
    console.print(f"{len(runs)} runs, {there} of them finished before", highlight=False)

    def said(run: Planned, lines: str | None) -> None:
        nonlocal ended
        ended += 1
        place = f"[{there + ended}/{len(runs)}] {run.name}, seed {run.seed}"
        if lines is not None:
            console.print(f"{place}: failed\n{lines}", highlight=False, markup=False)
            return
        metric = next(iter(comparison.metrics))
        figure = json.loads((run.folder / "results.json").read_text()).get(metric)
        told = "no such figure" if figure is None else f"{figure:.4g}"
        console.print(f"{place}: {metric} {told}", highlight=False, markup=False)

    threads = comparison.threads or (1 if comparison.workers > 1 else os.cpu_count() or 1)
    return run_all(runs, comparison.workers, threads, said)


def written(rows: list[table.Row], comparison: Comparison) -> None:
    """Write the table beside the runs."""
    write_text(comparison.output / "results.json", json.dumps(table.as_data(rows, comparison), indent=1) + "\n")
    write_text(comparison.output / "results.md", table.markdown(rows, comparison))
