"""The table of a comparison: means and intervals over seeds, differences from the baseline seed by seed."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from kdlm.compare.planned import Planned
from kdlm.compare.sections import Comparison
from kdlm.compare.workers import seconds_of
from kdlm.estimates import Estimate, finite, mean, paired, written
from kdlm.markdown import table as markdown_table
from kdlm.metrics import metric as described


@dataclass
class Row:
    """What the runs of one name came to.

    Attributes:
        figures: for each seed that ended, everything of its `results.json` that is a number.
        seconds: for each seed that ended, how long it took: `wall` and `cpu`, nan where it was stopped in between.
        failed: for each seed that did not end, the last lines of what it said.
    """

    name: str
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def over_seeds(self, metric: str) -> Estimate:
        """Return the mean of a metric over the seeds; nan where no run has it."""
        return mean([figures[metric] for figures in self.figures.values() if metric in figures])

    def beyond(self, baseline: "Row", metric: str) -> Estimate:
        """Return the mean difference from the baseline, over the seeds that both have."""
        seeds = [s for s, figures in self.figures.items() if metric in figures]
        both = [seed for seed in seeds if metric in baseline.figures.get(seed, {})]
        ours, theirs = ([row.figures[seed][metric] for seed in both] for row in (self, baseline))
        return paired(ours, theirs)

    def pace(self, clock: str) -> float:
        """Return the seconds of a run by a clock, `wall` or `cpu`, on average; nan where none is known."""
        return mean([one[clock] for one in self.seconds.values() if not math.isnan(one[clock])]).value


def gathered(runs: Iterable[Planned], failed: dict[str, str], metric: str) -> list[Row]:
    """Read the results of the runs, one row a name; a run without the `metric` that ranks them has failed."""
    rows: dict[str, Row] = {}
    for run in runs:
        row = rows.setdefault(run.name, Row(run.name))
        if not run.finished:
            row.failed[run.seed] = failed.get(str(run.folder), "not run")
            continue
        results = json.loads((run.folder / "results.json").read_text())
        figures = {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
        if metric in figures:
            row.figures[run.seed], row.seconds[run.seed] = figures, seconds_of(run.folder)
        else:
            row.failed[run.seed] = f"metrics: the run has no {metric}. It has: {', '.join(sorted(figures))}"
    return list(rows.values())


def ranked(rows: Iterable[Row], comparison: Comparison) -> list[Row]:
    """Return the rows, best first by the first metric; names decide between equals, rows without a figure are last."""
    metric, way = next(iter(comparison.metrics.items()))

    def place(row: Row) -> tuple[bool, float, str]:
        value = row.over_seeds(metric).value
        return math.isnan(value), 0.0 if math.isnan(value) else (value if way == "lower" else -value), row.name

    return sorted(rows, key=place)


def as_data(rows: list[Row], comparison: Comparison) -> dict[str, Any]:
    """Return what `results.json` of a comparison says; no figure is null."""
    baseline = next((row for row in rows if row.name == comparison.baseline), None)
    runs = {}
    for row in ranked(rows, comparison):
        entry: dict[str, Any] = {"metrics": {m: _figure(row.over_seeds(m)) for m in comparison.metrics}}
        if baseline is not None and row is not baseline:
            beyond = {m: row.beyond(baseline, m) for m in comparison.metrics}
            entry["against_baseline"] = {
                m: {"difference": finite(e.value), "error": finite(e.error), "p_value": finite(e.p_value)}
                for m, e in beyond.items()
            }
        entry["seconds"] = {clock: finite(row.pace(clock)) for clock in ("wall", "cpu")}
        entry["seeds"] = {
            str(s): {
                "seconds": {clock: finite(value) for clock, value in row.seconds[s].items()},
                "metrics": {name: finite(value) for name, value in row.figures[s].items()},
            }
            for s in row.figures
        } | {str(seed): {"failed": lines} for seed, lines in row.failed.items()}
        runs[row.name] = entry
    return {"comparison": comparison.model_dump(mode="json"), "runs": runs}


def _figure(estimate: Estimate) -> dict[str, float | None]:
    low, high = estimate.interval()
    return {**estimate.as_json(), "low": finite(low), "high": finite(high)}


def cells(rows: list[Row], comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings of the table and its rows as text."""
    baseline = next((row for row in rows if row.name == comparison.baseline), None)
    first = next(iter(comparison.metrics))
    head = ["rank", "run", *(described(metric).title for metric in comparison.metrics)]
    if baseline is not None:
        head += [f"difference to {baseline.name}", "p"]
    body = []
    for place, row in enumerate(ranked(rows, comparison), 1):
        estimates = [row.over_seeds(metric) for metric in comparison.metrics]
        line = ["-" if math.isnan(estimates[0].value) else str(place), row.name, *map(with_interval, estimates)]
        if baseline is not None:
            beyond = row.beyond(baseline, first)
            line += ["", ""] if row is baseline else [signed(beyond), _or_dash(beyond.p_value, ".2g")]
        body.append([*line, *(_or_dash(row.pace(clock), ".0f") for clock in ("wall", "cpu"))])
    return [*head, "seconds", "CPU seconds"], body


def with_interval(estimate: Estimate) -> str:
    """Return `1.234 ± 0.056`, the second half of the 95 % interval; the value alone where one seed cannot tell."""
    return written(estimate.value, estimate.interval()[1] - estimate.value)


def signed(estimate: Estimate) -> str:
    text = with_interval(estimate)
    return text if text.startswith("-") else f"+{text}"


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def markdown(rows: list[Row], comparison: Comparison) -> str:
    """Return the table as markdown, with what failed below it."""
    head, body = cells(rows, comparison)
    seeds = ", ".join(map(str, comparison.seeds))
    ways = ", ".join(f"{described(metric).title} {way}" for metric, way in comparison.metrics.items())
    lines = [f"Seeds {seeds}; means ± half of the 95 % interval over seeds (Student's t); better is: {ways}.", ""]
    lines.append(markdown_table(head, body))
    for row in rows:
        lines += [f"\n{row.name}, seed {seed}, failed:\n\n```\n{said}\n```" for seed, said in row.failed.items()]
    return "\n".join(lines) + "\n"


def printed(rows: list[Row], comparison: Comparison) -> Table:
    """Return the table for a terminal."""
    head, body = cells(rows, comparison)
    table = Table(*head, title=f"{len(rows)} runs, {len(comparison.seeds)} seeds each", title_justify="left")
    for line in body:
        table.add_row(*line)
    return table


def of_trials(trials: Iterable[Any], metric: str) -> str:
    """Return the trials of a search, best first, as markdown."""
    trials = list(trials)
    rows = []
    for trial in trials:
        figure = "failed" if trial.figure is None else f"{trial.figure:.4g}"
        values = [f"{v:.4g}" if isinstance(v, float) else f"`{json.dumps(v)}`" for v in trial.values.values()]
        rows.append([f"{trial.number}", figure, *values])
    return f"## Search\n\n{markdown_table(['trial', described(metric).title, *trials[0].values], rows)}\n"
