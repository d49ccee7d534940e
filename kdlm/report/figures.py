"""The figures of a report as Vega-Lite specs: plain dicts with their data inside, one for page, PNG and trackers.

A spec's `title` is its caption, its `description` is what it says to who cannot see it, and `usermeta.columns` names
the columns of its data for a table. Colours are left to the config (`kdlm.report.look`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from kdlm.report.groups import Group, grouped
from kdlm.report.metrics import TEACHERS, metric, shown
from kdlm.report.run import Points, Run, finite

Spec = dict[str, Any]
MOST_POINTS = 400
"""Points of a line that are drawn; of more, the first, the last, and the lowest and highest of each stretch are."""
HEIGHT = 170
OPTIMISER = ("grad_norm", "learning_rate")
PACE = ("tokens_per_second", "images_per_second", "samples_per_second")


def figures(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return the figures of these runs by name; those that nothing was measured for are left out."""
    groups = grouped(runs)
    return curves(groups) | gaps(groups) | reliability(runs) | resources(groups) | mixture(runs)


def curves(groups: Sequence[Group]) -> dict[str, Spec]:
    """Return a panel for each reading: what training logged as a thin line, held-out values as a line with dots.

    Readings that are equal number for number share a panel.
    """
    runs = [run for group in groups for run in group.runs]
    trained = dict.fromkeys(name for run in runs for name in run.readings() if not name.startswith("eval_"))
    held_out = dict.fromkeys(name.removeprefix("eval_") for run in runs for name in run.readings("eval_"))
    beside = {theirs for ours, theirs in TEACHERS.items() if ours in held_out}
    names = [name for name in {**trained, **held_out} if name not in {*beside, *PACE, *OPTIMISER, "memory_gib"}]
    order = list(dict.fromkeys(["loss", *trained, *METRIC_ORDER, *held_out]))
    names.sort(key=order.index)
    made: dict[str, Spec] = {}
    same: dict[Any, list[str]] = {}
    for name in [*names, *(name for name in OPTIMISER if name in trained)]:
        same.setdefault(repr([(run.points(name), run.points(f"eval_{name}")) for run in runs]), []).append(name)
    for alike in same.values():
        title = " = ".join(metric(name).title for name in alike)
        made[f"curves/{alike[-1]}"] = over_steps(groups, alike[-1], title=title)
    return made


METRIC_ORDER = ("cross_entropy", "kl_to_teacher", "reverse_kl_to_teacher", "top1_agreement", "accuracy")


def gaps(groups: Sequence[Group]) -> dict[str, Spec]:
    """Return how much of the gap between its first evaluation and the teacher each run has closed, over its steps."""
    lines, notes = {}, set()
    for run in (run for group in groups for run in group.runs):
        if points := gap_closed(run):
            lines[run.name] = points
            notes.add(points[0][0])
    if not lines:
        return {}
    first = f"its evaluation at step {notes.pop()}" if len(notes) == 1 else "its first evaluation"
    spec = _panel(
        "Gap closed",
        f"0 is the held-out cross-entropy at {first}, 100 that of the teacher.",
        "%",
        [(group.label, [(run.name, "held out", lines[run.name]) for run in group.runs if run.name in lines])
         for group in groups],
        scale=100,
        marks=[("teacher", 100.0)],
    )  # fmt: skip
    return {"gap_closed": spec}


def gap_closed(run: Run) -> Points:
    """Return (start - student) / (start - teacher) of the held-out loss, where start is the first evaluation."""
    ours, theirs = run.points("eval_cross_entropy"), dict(run.points("eval_teacher_cross_entropy"))
    if len(ours) < 2 or not theirs or finite(ours[0][1]) is None:
        return []
    start = ours[0][1]
    return [
        (step, (start - value) / (start - theirs[step])) for step, value in ours if theirs.get(step, start) != start
    ]


def over_steps(groups: Sequence[Group], name: str, title: str = "") -> Spec:
    """Return one reading of all runs over their steps, with the teacher's own value where it is constant."""
    known = metric(name)
    scale = 100 if known.share else 1
    lines = []
    for group in groups:
        found = [(run.name, "training", run.points(name)) for run in group.runs]
        found += [(run.name, "held out", run.points(f"eval_{name}")) for run in group.runs]
        lines.append((group.label, [each for each in found if each[2]]))
    theirs = TEACHERS.get(name, "")
    levels = {value for g in groups for run in g.runs for _, value in run.points(f"eval_{theirs}") if finite(value)}
    return _panel(
        title or known.title,
        "",
        known.unit,
        lines,
        scale=scale,
        marks=[("teacher", scale * levels.pop())] if len(levels) == 1 else [],
        zero=name in (*PACE, "memory_gib"),
    )


Lines = Sequence[tuple[str, Sequence[tuple[str, str, Points]]]]
"""For each group its label, and its lines: run, kind (training or held out), points."""


def _panel(
    title: str,
    said: str,
    unit: str,
    lines: Lines,
    *,
    scale: float = 1,
    marks: Sequence[tuple[str, float]] = (),
    zero: bool = False,
) -> Spec:
    """Return a panel of lines over steps, each group labelled at the end of its line."""
    labels = [label for label, _ in lines]
    rows, ends, lost = [], [], 0
    for label, each in lines:
        for run, kind, points in each:
            real = [(step, scale * value) for step, value in points if finite(value) is not None]
            lost += len(points) - len(real)
            rows += [_row(label, run, kind, *point) for point in thinned(real)]
        if last := [points for *_, points in each if points and finite(points[-1][1]) is not None]:
            ends.append((label, scale * last[-1][-1][1]))
    low, high = _domain([row["value"] for row in rows] + [value for _, value in marks] + [0.0] * zero)
    ends += list(marks)
    placed = _apart(ends, 13 / HEIGHT * (high - low), low, high)
    data = {"values": [{"label": label, "at": at} for (label, _), at in zip(ends, placed, strict=True)]}
    x: dict[str, Any] = {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "axis": {"tickCount": 5, "format": "~s"},
    }
    steps = [row["step"] for row in rows]
    first, last_step = min(steps, default=0), max(steps, default=1)
    x["scale"] = {"domain": [first, max(last_step, first + 1)], "nice": False}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"domain": [low, high], "nice": False}}
    colour = {"field": "run", "type": "nominal", "scale": {"domain": labels}, "legend": None}
    several = len(labels) > 1 or bool(marks)
    strong = {"filter": "datum.kind == 'held out'"}
    line = {"x": x, "y": y, "color": colour, "detail": [{"field": "name"}, {"field": "kind"}]}
    thin = {"type": "line", "strokeWidth": 1, "opacity": 0.55 if any(r["kind"] == "held out" for r in rows) else 1}
    tooltip = [{"field": "name", "title": "run"}, {"field": "kind"}, {"field": "step"}]
    tooltip.append({"field": "value", "format": ".5~g", "title": unit or "value"})
    layers: list[Spec] = [
        {"transform": [{"filter": "datum.kind != 'held out'"}], "mark": thin, "encoding": line},
        {"transform": [strong], "mark": {"type": "line", "strokeWidth": 2}, "encoding": line},
        {"transform": [strong], "mark": {"type": "circle", "size": 22, "opacity": 1}, "encoding": line},
        {"mark": {"type": "circle", "size": 120, "opacity": 0}, "encoding": line | {"tooltip": tooltip}},
    ]
    for _, value in marks:
        layers.append({"mark": {"type": "rule", "strokeDash": [3, 3]}, "encoding": {"y": {"datum": value}}})
    if several:
        text = {"type": "text", "align": "left", "dx": 6, "clip": False}
        paint = {"condition": {"test": "datum.label != 'teacher'", **colour, "field": "label"}, "value": None}
        if any(label == "teacher" for label, _ in marks):
            layers.append({"data": {"values": [d for d in data["values"] if d["label"] == "teacher"]}, "mark": text,
                           "encoding": {"x": {"value": "width"}, "y": {"field": "at", "type": "quantitative"}, "text": {"field": "label"}}})  # fmt: skip
        data = {"values": [d for d in data["values"] if d["label"] in labels]}
        del paint
        encoding = {"x": {"value": "width"}, "y": {"field": "at", "type": "quantitative"}, "text": {"field": "label"}}
        layers.append({"data": data, "mark": text, "encoding": encoding | {"color": colour | {"field": "label"}}})
    note = f" {lost} values that are not finite are left out." if lost else ""
    spec = _spec(title, f"{said}{note} {_summary(lines, scale, unit)}".strip(), unit)
    columns = {"name": "run", "kind": "kind", "step": "step", "value": unit or "value"}
    return spec | {
        "data": {"values": rows},
        "layer": layers,
        "height": HEIGHT,
        "padding": 6,
        "usermeta": {"columns": columns, "said": f"{said}{note}".strip()},
    }


def _row(label: str, run: str, kind: str, step: int, value: float) -> dict[str, Any]:
    return {"run": label, "name": run, "kind": kind, "step": step, "value": value}


def _spec(title: str, description: str, unit: str = "") -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": f"{title}, {unit}" if unit and unit not in title else title,
        "description": f"{title}. {description}",
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
    }


def _summary(lines: Lines, scale: float, unit: str) -> str:
    """Return what the lines do, a clause each."""
    clauses = [
        f"{run}, {kind}: from {shown(scale * points[0][1])} at step {points[0][0]} "
        f"to {shown(scale * points[-1][1])} at step {points[-1][0]}"
        for _, each in lines
        for run, kind, points in each
        if points
    ]
    return "; ".join(clauses[:12]) + (f"; and {len(clauses) - 12} more lines" if len(clauses) > 12 else "") + "."


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most about `most` of the points: the first, the last, the lowest and highest of each stretch."""
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], max(1, (most - 2) // 2)
    size = -(-len(inner) // stretches)
    kept: Points = []
    for start in range(0, len(inner), size):
        stretch = inner[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return [points[0], *kept, points[-1]]


def _domain(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    spare = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - spare if low != 0 else 0.0), high + spare


def _apart(ends: Sequence[tuple[str, float]], least: float, low: float, high: float) -> list[float]:
    """Return places near the ends' values that are at least `least` apart, for labels that do not overlap."""
    order = sorted(range(len(ends)), key=lambda number: ends[number][1])
    places = [0.0] * len(ends)
    floor = low
    for number in order:
        places[number] = floor = max(ends[number][1], floor)
        floor += least
    ceiling = high
    for number in reversed(order):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - least
    return places


def reliability(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return, for each run that was inspected, how often student and teacher are right at each confidence."""
    made = {}
    for run in runs:
        bins = ((run.inspection or {}).get("measured") or {}).get("reliability") or {}
        rows = [row for who in ("student", "teacher") for row in _bins(who, bins.get(who))]
        if not rows:
            continue
        axis = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": "%", "tickCount": 5}}
        tooltip = [{"field": "who"}, {"field": "confidence", "format": ".1%"}, {"field": "accuracy", "format": ".1%"}]
        tooltip.append({"field": "count", "format": ",", "title": "tokens"})
        encoding = {
            "x": {"field": "confidence", "title": "probability of the likeliest token", **axis},
            "y": {"field": "accuracy", "title": "how often it is right", **axis},
            "color": {"field": "who", "type": "nominal", "scale": {"domain": ["student", "teacher"]},
                      "legend": {"title": None, "orient": "top-left", "symbolType": "circle"}},
        }  # fmt: skip
        size = {"field": "count", "type": "quantitative", "scale": {"rangeMin": 8, "rangeMax": 320}}
        most = max(row["count"] for row in rows)
        sizes = sorted({float(f"{most * share:.1g}") for share in (0.1, 0.5, 1)})
        size["legend"] = {"title": "tokens", "orient": "bottom-right", "values": sizes}  # pyright: ignore
        diagonal = {
            "data": {"values": [{"c": 0}, {"c": 1}]},
            "mark": {"type": "line", "strokeDash": [3, 3], "opacity": 0.5},
        }
        at = {"field": "c", "type": "quantitative"}
        spec = _spec(f"Reliability: {run.name}", _calibration(rows))
        made[f"reliability/{run.name}"] = spec | {
            "data": {"values": rows},
            "height": 260,
            "layer": [
                diagonal | {"encoding": {"x": at, "y": at, "color": {"value": "gray"}}},
                {"mark": {"type": "line", "strokeWidth": 1, "opacity": 0.4}, "encoding": encoding},
                {
                    "mark": {"type": "circle", "opacity": 0.85},
                    "encoding": encoding | {"size": size, "tooltip": tooltip},
                },
            ],
            "usermeta": {
                "columns": {"who": "model", "confidence": "confidence", "accuracy": "accuracy", "count": "tokens"},
                "said": "On the diagonal a model is right as often as it says; area counts tokens.",
            },
        }
    return made


def _bins(who: str, bins: dict[str, list[float]] | None) -> Iterable[dict[str, Any]]:
    if not bins:
        return
    for confidence, accuracy, count in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True):
        if count and finite(confidence) is not None and finite(accuracy) is not None:
            yield {"who": who, "confidence": confidence, "accuracy": accuracy, "count": int(count)}


def _calibration(rows: Sequence[dict[str, Any]]) -> str:
    clauses = []
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = [row for row in rows if row["who"] == who]
        total = sum(row["count"] for row in mine)
        error = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in mine) / total
        clauses.append(f"{who}: expected calibration error {100 * error:.1f} % over {total:,} tokens")
    return "; ".join(clauses) + "."


def resources(groups: Sequence[Group]) -> dict[str, Spec]:
    """Return throughput and memory over the steps, as far as they were logged."""
    names = [name for name in (*PACE, "memory_gib") if any(run.points(name) for g in groups for run in g.runs)]
    return {f"resources/{name}": over_steps(groups, name) for name in names}


def mixture(runs: Sequence[Run]) -> dict[str, Spec]:
    """Return what the training data are made of, for each set of data that a run has read."""
    made: dict[str, Spec] = {}
    seen: dict[str, str] = {}
    for run in runs:
        sources = run.data.get("train") or []
        unit = "trained_tokens" if any(source.get("trained_tokens") for source in sources) else "kept"
        rows = [
            {"source": f"{source['source']}", "count": source.get(unit, 0), "rows": source.get("kept", 0)}
            for source in sources
        ]
        if not rows or (key := repr(rows)) in seen:
            continue
        seen[key] = run.name
        word = "tokens" if unit == "trained_tokens" else "rows"
        total = sum(row["count"] for row in rows) or 1
        for row in rows:
            row["said"] = f"{row['count']:,} ({100 * row['count'] / total:.0f} %)"
        y = {
            "field": "source",
            "type": "nominal",
            "sort": None,
            "title": None,
            "axis": {"labelLimit": 240, "domain": False},
        }
        x = {"field": "count", "type": "quantitative", "axis": None}
        clauses = "; ".join(f"{row['source']}: {row['said']}" for row in rows)
        spec = _spec(f"Training data by source, {word}", f"{clauses}.")
        text = {"type": "text", "align": "left", "dx": 5}
        made[f"mixture/{run.name}"] = spec | {
            "data": {"values": rows},
            "height": 24 * len(rows),
            "padding": 6,
            "layer": [
                {"mark": {"type": "bar", "height": 12}, "encoding": {"x": x, "y": y}},
                {"mark": text, "encoding": {"x": x, "y": y, "text": {"field": "said"}}},
            ],
            "usermeta": {"columns": {"source": "source", "count": word, "rows": "rows used"}, "said": ""},
        }
    return made
