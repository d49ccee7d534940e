"""Making the runs that are missing, and saying so."""

import json
import os

from rich.console import Console

from kdlm.compare.planned import Planned
from kdlm.compare.sections import Comparison
from kdlm.compare.workers import run_all


def made(runs: list[Planned], comparison: Comparison, console: Console) -> dict[str, str]:
    """Make what is missing of some runs, saying how each ended; return the last words of the failed, by folder."""
    there, ended = sum(run.finished for run in runs), 0
    if runs:
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
