"""One panel of lines over steps, as a Vega-Lite spec: the piece that most figures of a report are.

A spec is a plain dict with its data inside. Its `title` is its caption, its `description` is what it says to who cannot
see it, `usermeta.columns` names the columns of its data for a table, and `usermeta.said` explains it in a line. Colours
are left to the config (`kdlm.report.look`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdlm.report.markup import visible
from kdlm.report.numbers import shown
from kdlm.report.run import Points

Spec = dict[str, Any]
MOST_POINTS = 1200
"""Points of a panel that are drawn; of more, of each line the first, the last, and the lowest and highest of each
stretch are."""
LEAST_POINTS = 40
LARGEST = 1e100
"""What is larger counts as not finite: an axis could not be drawn to it."""
MOST_CLAUSES = 12
HEIGHT = 170
LABEL = 13
"""Pixels from one direct label to the next."""


@dataclass(frozen=True)
class Line:
    """What one run logged of one reading; lines of a group share a colour and a label."""

    group: str
    run: str
    kind: str
    points: Points


def panel(
    title: str,
    lines: Sequence[Line],
    *,
    groups: Sequence[str],
    unit: str = "",
    said: str = "",
    scale: float = 1,
    level: tuple[str, float] | None = None,
    zero: bool = False,
) -> Spec:
    """Return a panel of lines over steps, each group labelled at the end of its line.

    Args:
        lines: kinds are `training`, drawn thin, and `held out`, drawn with dots.
        groups: all groups of the page, in the order of their colours.
        scale: factor of the values, 100 for percent.
        level: name and value (scaled) of a level line.
        zero: whether the axis begins at 0.
    """
    real = [_real(line, scale) for line in lines]
    lost = sum(len(line.points) for line in lines) - sum(len(line.points) for line in real)
    most = max(LEAST_POINTS, MOST_POINTS // max(1, len(lines)))
    rows = [
        {"run": line.group, "name": line.run, "kind": line.kind, "step": step, "value": value}
        for line in real
        for step, value in thinned(line.points, most)
    ]
    low, high = _domain([row["value"] for row in rows] + ([level[1]] if level else []) + [0.0] * zero)
    what = "1 value that is not finite is" if lost == 1 else f"{lost} values that are not finite are"
    note = f"{what} left out." if lost else ""
    words = " ".join(part for part in (said, note) if part)
    spec = blank(title, f"{words} {_summary(real)}".strip(), unit)
    columns = {"name": "run", "kind": "kind", "step": "step", "value": unit or "value"}
    return spec | {
        "height": HEIGHT,
        "data": {"values": rows},
        "layer": [*_lines(rows, groups, (low, high), unit), *_labels(real, groups, (low, high), level)],
        "usermeta": {"columns": columns, "said": words},
    }


def blank(title: str, description: str, unit: str = "") -> Spec:
    """Return what every figure has: a title with its unit, a description, the width of its place."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": visible(f"{title}, {unit}" if unit else title),
        "description": visible(f"{title}. {description}"),
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 0, "right": 8, "top": 4, "bottom": 4},
    }


def thinned(points: Points, most: int) -> Points:
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


def _real(line: Line, scale: float) -> Line:
    points = [(step, scale * value) for step, value in line.points if abs(value) < LARGEST]  # nan is not
    return Line(line.group, line.run, line.kind, points)


def _lines(rows: Sequence[Spec], groups: Sequence[str], domain: tuple[float, float], unit: str) -> list[Spec]:
    """Return the layers of the lines, of their dots, and of unseen larger dots that answer the pointer."""
    steps = [row["step"] for row in rows] or [0]
    reach = [min(steps), max(max(steps), min(steps) + 1)]
    encoding = {
        "x": {
            "field": "step",
            "type": "quantitative",
            "title": "step",
            "axis": {"tickCount": 5, "format": "~s"},
            "scale": {"domain": reach, "nice": False},
        },
        "y": {
            "field": "value",
            "type": "quantitative",
            "title": None,
            "scale": {"domain": list(domain), "nice": False},
        },
        "color": _colour("run", groups),
        "detail": [{"field": "name"}, {"field": "kind"}],
    }
    tooltip = [
        {"field": "name", "title": "run"},
        {"field": "kind"},
        {"field": "step"},
        {"field": "value", "format": ".5~g", "title": unit or "value"},
    ]
    held_out, training = {"filter": "datum.kind == 'held out'"}, {"filter": "datum.kind != 'held out'"}
    both = {row["kind"] for row in rows} == {"held out", "training"}
    thin = {"type": "line", "strokeWidth": 1, "opacity": 0.55 if both else 1}
    return [
        {"transform": [training], "mark": thin, "encoding": encoding},
        {"transform": [held_out], "mark": {"type": "line", "strokeWidth": 2}, "encoding": encoding},
        {"transform": [held_out], "mark": {"type": "circle", "size": 22, "opacity": 1}, "encoding": encoding},
        {"mark": {"type": "circle", "size": 120, "opacity": 0}, "encoding": encoding | {"tooltip": tooltip}},
    ]


def _labels(
    lines: Sequence[Line], groups: Sequence[str], domain: tuple[float, float], level: tuple[str, float] | None
) -> list[Spec]:
    """Return the layers of the level line and of the labels at the right end, where there is more than one thing."""
    ends = {line.group: line.points[-1][1] for line in lines if line.points}  # the last line of a group: held out
    if len(groups) < 2 and level is None:
        return []
    places = _apart([*ends.values(), *([level[1]] if level else [])], domain)
    text = {"type": "text", "align": "left", "dx": 6}
    encoding = {
        "x": {"value": "width"},
        "y": {"field": "at", "type": "quantitative"},
        "text": {"field": "label", "type": "nominal"},
    }
    data = [{"label": label, "at": at} for label, at in zip(ends, places, strict=False)]
    painted = encoding | {"color": _colour("label", groups)}
    layers: list[Spec] = [{"data": {"values": data}, "mark": text, "encoding": painted}] if len(groups) > 1 else []
    if level is not None:
        name = {"values": [{"label": level[0], "at": places[-1]}]}
        layers.append({"mark": {"type": "rule", "strokeDash": [3, 3]}, "encoding": {"y": {"datum": level[1]}}})
        layers.append({"data": name, "mark": text, "encoding": encoding})
    return layers


def _colour(field: str, groups: Sequence[str]) -> Spec:
    return {"field": field, "type": "nominal", "scale": {"domain": list(groups)}, "legend": None}


def _summary(lines: Sequence[Line]) -> str:
    """Return what the lines do, a clause each."""
    clauses = [
        f"{line.run}, {line.kind}: from {shown(line.points[0][1])} at step {line.points[0][0]} "
        f"to {shown(line.points[-1][1])} at step {line.points[-1][0]}"
        for line in lines
        if line.points
    ]
    more = len(clauses) - MOST_CLAUSES
    return "; ".join(clauses[:MOST_CLAUSES]) + (f"; and {more} more lines" if more > 0 else "") + "."


def _domain(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    spare = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - spare if low != 0 else 0.0), high + spare


def _apart(ends: Sequence[float], domain: tuple[float, float]) -> list[float]:
    """Return places near the ends, for labels that do not overlap, inside the domain as far as they fit."""
    low, high = domain
    least = LABEL / HEIGHT * (high - low)
    order = sorted(range(len(ends)), key=lambda number: ends[number])
    places, floor = [0.0] * len(ends), low
    for number in order:
        places[number] = max(ends[number], floor)
        floor = places[number] + least
    ceiling = high
    for number in reversed(order):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - least
    return places
