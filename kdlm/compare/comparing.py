"""`kdlm compare`: every run, then the table."""

import json

from rich.console import Console

from kdlm.compare import search, table
from kdlm.compare.planned import planned
from kdlm.compare.running import made
from kdlm.compare.sections import Comparison
from kdlm.disk import write_text
from kdlm.report import report
from kdlm.report.drawing import bundle


def compare(comparison: Comparison, console: Console | None = None) -> list[table.Row]:
    """Make every run that is not there yet and write `results.json` and `results.md`; return what came of them.

    A run that fails is in the table with its last words, and the others go on. Started again, the command leaves
    finished runs as they are and goes on with those that were stopped. Where there is a search, the best of its trials
    is run on all seeds as `best`.

    Raises ValueError, before anything is run, with all that is wrong with any of the recipes.
    """
    console = console or Console(soft_wrap=True)
    if comparison.report:
        bundle()  # what it needs is missing now, not in an hour
    planned(comparison, [*search.problems(comparison)])
    trials: list[search.Trial] = []
    if comparison.search is not None:
        best, trials = search.searched(comparison, console)
        comparison = comparison.model_copy(update={"runs": {**comparison.runs, search.BEST: best}})
    runs = planned(comparison)
    failed = made(runs, comparison, console)
    rows = table.gathered(runs, failed, next(iter(comparison.metrics)))
    data, text = table.as_data(rows, comparison), table.markdown(rows, comparison)
    if trials:
        data["search"] = [trial._asdict() for trial in trials]
        text += "\n" + table.of_trials(trials, next(iter(comparison.metrics)))
    write_text(comparison.output / "results.json", json.dumps(data, indent=1) + "\n")
    write_text(comparison.output / "results.md", text)
    console.print(table.printed(rows, comparison))
    console.print(f"table: {comparison.output / 'results.md'}", highlight=False)
    if comparison.report and (ended := [run.folder for run in runs if run.finished]):
        for line in report(ended, comparison.output / "report.html", inspect=False):
            console.print(line, highlight=False, markup=False)
    return rows
