"""The figures of a report as Vega-Lite specs: one definition for page, PNG and trackers (see `panel`)."""

from collections.abc import Iterable, Sequence
from typing import Any

from kdlm.estimates import finite
from kdlm.metrics import METRICS, TEACHERS, gap_closed, metric
from kdlm.report.groups import Group, grouped
from kdlm.report.markup import visible
from kdlm.report.panel import LARGEST, Line, Spec, blank, panel
from kdlm.report.run import Points, Run

OPTIMISER = ("grad_norm", "learning_rate")
PACE = ("tokens_per_second", "images_per_second", "samples_per_second")
COST = (*PACE, "memory_gib")


def figures(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return the figures of these runs by name; those that nothing was measured for are left out."""
    groups = grouped(runs)
    return curves(groups) | gaps(groups) | reliability(runs) | resources(groups) | mixture(runs)


def curves(groups: Sequence[Group]) -> dict[str, Spec]:
    """Return a panel for each reading: the loss and its terms, held-out measures, the optimiser.

    Readings that are equal number for number share a panel.
    """
    runs = [run for group in groups for run in group.runs]
    trained = dict.fromkeys(name for run in runs for name in run.readings() if not name.startswith("eval_"))
    held_out = dict.fromkeys(name.removeprefix("eval_") for run in runs for name in run.readings("eval_"))
    order = {name: None for name in ["loss", *trained, *METRICS, *held_out] if name in {*trained, *held_out}}
    beside = {theirs for ours, theirs in TEACHERS.items() if ours in held_out}
    names = [name for name in order if name not in {*beside, *COST, *OPTIMISER}]
    same: dict[str, list[str]] = {}
    for name in [*names, *(name for name in OPTIMISER if name in trained)]:
        same.setdefault(repr([(run.points(name), run.points(f"eval_{name}")) for run in runs]), []).append(name)
    return {
        f"curves/{alike[-1]}": over_steps(groups, alike[-1], " = ".join(metric(name).title for name in alike))
        for alike in same.values()
    }


def gaps(groups: Sequence[Group]) -> dict[str, Spec]:
    """Return how much of the gap between its first evaluation and the teacher each run has closed, over its steps."""
    found = [(group.label, run.name, points) for group in groups for run in group.runs if (points := closed(run))]
    if not found:
        return {}
    firsts = {points[0][0] for *_, points in found}
    first = f"step {firsts.pop()}" if len(firsts) == 1 else "its first evaluation"
    spec = panel(
        "Gap closed",
        [Line(label, name, "held out", points) for label, name, points in found],
        groups=[group.label for group in groups],
        unit="%",
        said=f"0 is the held-out cross-entropy at {first}, 100 that of the teacher.",
        scale=100,
        level=("teacher", 100.0),
    )
    return {"gap_closed": spec}


def closed(run: Run) -> Points:
    """Return the share of the gap between its first evaluation and the teacher's that each evaluation has closed."""
    ours, theirs = run.points("eval_cross_entropy"), dict(run.points("eval_teacher_cross_entropy"))
    if len(ours) < 2:
        return []
    start = ours[0][1]
    points = [(step, gap_closed(start, value, theirs[step])) for step, value in ours if step in theirs]
    return points if any(finite(share) is not None for _, share in points) else []


def over_steps(groups: Sequence[Group], name: str, title: str = "") -> Spec:
    """Return one reading of all runs over their steps, with the teacher's own value where it is constant."""
    known = metric(name)
    kinds = (("training", name), ("held out", f"eval_{name}"))
    lines = [
        Line(group.label, run.name, kind, points)
        for group in groups
        for run in group.runs
        for kind, key in kinds
        if (points := run.points(key))
    ]
    theirs = f"eval_{TEACHERS.get(name, '')}"
    levels = {value for group in groups for run in group.runs for _, value in run.points(theirs)}
    return panel(
        title or known.title,
        lines,
        groups=[group.label for group in groups],
        unit=known.unit,
        scale=known.scale,
        level=("teacher", known.scale * levels.pop()) if len(levels) == 1 and abs(min(levels)) < LARGEST else None,
        zero=name in COST,
    )


def resources(groups: Sequence[Group]) -> dict[str, Spec]:
    """Return throughput and memory over the steps, as far as they were logged."""
    runs = [run for group in groups for run in group.runs]
    return {f"resources/{name}": over_steps(groups, name) for name in COST if any(run.points(name) for run in runs)}


def reliability(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return, for each run that was inspected, how often student and teacher are right at each confidence."""
    made = {}
    for run in runs:
        bins = ((run.inspection or {}).get("measured") or {}).get("reliability") or {}
        if rows := [row for who in ("student", "teacher") for row in _bins(who, bins.get(who))]:
            made[f"reliability/{run.name}"] = _diagram(run.name, rows)
    return made


def _diagram(name: str, rows: Sequence[Spec]) -> Spec:
    """Return one reliability diagram; the area of a dot is the number of tokens."""
    axis = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": "%", "tickCount": 5}}
    who = {"title": None, "orient": "top", "symbolType": "circle", "symbolOpacity": 1}
    encoding = {
        "x": {"field": "confidence", "title": "probability of the likeliest token", **axis},
        "y": {"field": "accuracy", "title": "how often it is right", **axis},
        "color": {"field": "who", "type": "nominal", "scale": {"domain": ["student", "teacher"]}, "legend": who},
    }
    most = max(row["count"] for row in rows)
    counts = sorted({float(f"{most * share:.1g}") for share in (0.1, 0.5, 1)})
    size = {
        "field": "count",
        "type": "quantitative",
        "scale": {"rangeMin": 8, "rangeMax": 320},
        "legend": {"title": "tokens", "orient": "bottom", "values": counts},
    }
    tooltip = [
        {"field": "who", "title": "model"},
        {"field": "confidence", "format": ".1%"},
        {"field": "accuracy", "format": ".1%"},
        {"field": "count", "format": ",", "title": "tokens"},
    ]
    at = {"field": "at", "type": "quantitative"}
    diagonal = {"type": "line", "strokeDash": [3, 3], "strokeWidth": 1, "opacity": 0.6}
    return blank(f"Reliability of {name}", _calibration(rows)) | {
        "height": 260,
        "data": {"values": rows},
        "layer": [
            {
                "data": {"values": [{"at": 0}, {"at": 1}]},
                "mark": diagonal,
                "encoding": {"x": at, "y": at, "color": {"value": "gray"}},
            },
            {"mark": {"type": "circle", "opacity": 0.85}, "encoding": encoding | {"size": size, "tooltip": tooltip}},
        ],
        "usermeta": {
            "columns": {"who": "model", "confidence": "confidence", "accuracy": "accuracy", "count": "tokens"},
            "said": _calibration(rows),
        },
    }


def _bins(who: str, bins: dict[str, list[Any]] | None) -> Iterable[Spec]:
    if not bins:
        return
    for confidence, accuracy, count in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True):
        if count and finite(confidence) is not None and finite(accuracy) is not None:
            yield {"who": who, "confidence": confidence, "accuracy": accuracy, "count": int(count)}


def _calibration(rows: Sequence[Spec]) -> str:
    """Return the expected calibration error of each model, from its bins."""
    clauses = []
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = [row for row in rows if row["who"] == who]
        total = sum(row["count"] for row in mine)
        error = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in mine) / total
        clauses.append(f"{who} {100 * error:.1f} % over {total:,} tokens")
    return f"Expected calibration error: {'; '.join(clauses)}."


def mixture(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return what the training data are made of, once for each set of data that the runs have read."""
    made: dict[str, Spec] = {}
    for run in runs:
        sources = run.data.get("train") or []
        unit = "trained_tokens" if any(source.get("trained_tokens") for source in sources) else "kept"
        rows = [
            {"source": visible(str(source["source"])), "count": source.get(unit, 0), "rows": source.get("kept", 0)}
            for source in sources
        ]
        total = sum(row["count"] for row in rows)
        for row in rows:
            row["said"] = f"{row['count']:,} ({100 * row['count'] / max(1, total):.0f} %)"
        if rows and rows not in [spec["data"]["values"] for spec in made.values()]:
            made[f"mixture/{run.name}"] = _bars(rows, "tokens" if unit == "trained_tokens" else "rows")
    return made


def _bars(rows: Sequence[Spec], word: str) -> Spec:
    names = {"labelLimit": 240, "domain": False, "ticks": False, "grid": False}
    encoding = {
        "y": {"field": "source", "type": "nominal", "sort": None, "title": None, "axis": names},
        "x": {"field": "count", "type": "quantitative", "axis": None, "scale": {"zero": True, "nice": False}},
    }
    text = {"type": "text", "align": "left", "dx": 5}
    clauses = "; ".join(f"{row['source']}: {row['said']}" for row in rows)
    return blank("Training data by source", f"{clauses}.", word) | {
        "height": 24 * len(rows),
        "data": {"values": rows},
        "layer": [
            {"mark": {"type": "bar", "height": 12}, "encoding": encoding},
            {"mark": text, "encoding": encoding | {"text": {"field": "said", "type": "nominal"}}},
        ],
        "usermeta": {"columns": {"source": "source", "count": word, "rows": "rows used"}, "said": ""},
    }
