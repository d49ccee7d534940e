"""The table of runs: held-out figures, cost, and what their recipes differ in."""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from kdlm.estimates import Estimate, finite
from kdlm.metrics import METRICS, TEACHERS, metric
from kdlm.report.groups import Group, comparable, differences
from kdlm.report.markup import Html, element, joined, table
from kdlm.report.numbers import plain, shown
from kdlm.report.run import Run
from kdlm.report.verdict import baseline, gap_to

MAIN = 7
"""Figures in the first table; the others are in one that is folded."""
MOST_KEYS = 24
"""Keys that recipes differ in that are shown at once; a longer table is folded."""
ELSEWHERE = frozenset({*TEACHERS.values(), "loss"})


def comparison(groups: Sequence[Group]) -> Html:
    """Return the table of held-out figures with the teacher's own, the folded rest, and notes."""
    known = [name for name in METRICS if name not in ELSEWHERE]
    there = dict.fromkeys(name for group in groups for run in group.runs for name in run.final)
    names = [name for name in known if name in there]
    rest = [name for name in there if name not in names and name not in ELSEWHERE]
    parts = [figures_table(groups, names[:MAIN], cost=True)]
    if names[MAIN:] or rest:
        more = figures_table(groups, [*names[MAIN:], *rest], cost=False)
        parts.append(element("details", element("summary", "All other held-out figures"), more))
    return joined([*parts, *(element("p", note, class_="said") for note in _notes(groups))])


def figures_table(groups: Sequence[Group], names: Sequence[str], *, cost: bool) -> Html:
    """Return a row for each group and a column for each figure, the best of it bold; the teacher comes last."""
    plain_one = baseline(groups) if len(groups) > 1 and comparable(groups) else None
    head = ["run", *(heading(name) for name in names)]
    head += [joined(["gap closed ", element("small", "% to teacher")])] if plain_one and cost else []
    head += [
        "steps",
        joined(["seen ", element("small", "tokens")]),
        joined(["time ", element("small", "h:min:s")]),
    ] * cost
    bests = {name: _best(groups, name) for name in names}
    rows = []
    for number, group in enumerate(groups):
        cells: list[Any] = [key(group, number)]
        cells += [_cell(group.final(name), name, best=bests[name] is group) for name in names]
        if plain_one and cost:
            gap = None if group is plain_one else gap_to(group, plain_one)
            cells.append("baseline" if group is plain_one else _cell(gap, "gap_closed"))
        rows.append(cells + (_cost(group) if cost else []))
    if theirs := _teachers(groups, names):
        rows.append([element("span", "teacher", class_="quiet"), *theirs, *[""] * (len(head) - 1 - len(theirs))])
    body = table(head, rows, "Held-out figures")
    return Html(body.replace("<td><b>", '<td class="best"><b>'))


def key(group: Group, number: int) -> Html:
    """Return a group's name beside the colour of its lines."""
    more = element("small", f" {len(group.runs)} seeds") if len(group.runs) > 1 else ""
    return element("span", element("span", group.label, more), class_=f"key series-{number % 8}")


def heading(name: str) -> Html:
    """Return what a figure is called, with its unit."""
    known = metric(name)
    return joined([known.title, " ", element("small", known.unit)] if known.unit else [known.title])


def _cell(found: Estimate | None, name: str, best: bool = False) -> Any:
    """Return a figure; of several seeds with half of its 95 % interval."""
    if found is None:
        return shown(None)
    said = shown(found.value, name)
    if found.freedom > 0 and math.isfinite(found.error):
        reach = found.interval()[1] - found.value
        said = joined([said, element("small", f" ± {shown(reach, name)}")])
    return element("b", said) if best else said


def _best(groups: Sequence[Group], name: str) -> Group | None:
    """Return the group with the best figure, where there are several to choose from and one way is better."""
    finals = [(found.value, group) for group in groups if (found := group.final(name)) and math.isfinite(found.value)]
    if not metric(name).better or len(finals) < 2 or not comparable(groups):
        return None
    return max(finals, key=lambda pair: metric(name).better * pair[0])[1]


def _teachers(groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    """Return the teacher's own figures, where all runs measured the same ones."""
    cells = []
    for name in names:
        values = {run.final[TEACHERS[name]] for g in groups for run in g.runs if TEACHERS.get(name) in run.final}
        cells.append(shown(values.pop(), name) if len(values) == 1 else "")
    return cells if any(cells) else []


def _cost(group: Group) -> list[str]:
    steps = "–".join(f"{step:,}" for step in sorted({run.steps for run in group.runs}))  # noqa: RUF001
    seen = [run.seen for run in group.runs]
    spent = [run.seconds for run in group.runs]
    return [
        steps,
        f"≈ {plain(round(max(s for s in seen if s)))}" if all(seen) else shown(None),
        str(timedelta(seconds=round(sum(s for s in spent if s) / len(spent)))) if all(spent) else shown(None),
    ]


def _notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    if len(groups) > 1 and comparable(groups):
        notes.append("Bold is the best figure measured; it is no test of significance.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Several seeds: the mean and half of its 95 % interval (Student's t).")
    plain_one = baseline(groups)
    if plain_one and len(plain_one.runs) == 1 and len(groups) > 1 and any(len(group.runs) > 1 for group in groups):
        notes.append("The baseline has one seed: what another would change is not in the interval of the gap closed.")
    if len(groups) > 1 and not comparable(groups):
        notes.append("The runs were not evaluated on the same data: their figures cannot be compared.")
    if any(run.seen for group in groups for run in group.runs):
        notes.append("Tokens seen: epochs done times the tokens trained on in one.")
    notes += [f"{run.name}: {'; '.join(run.notes)}." for group in groups for run in group.runs if run.notes]
    return [" ".join(notes)] if notes else []


def recipes(groups: Sequence[Group]) -> Html:
    """Return the keys that the recipes differ in, one a row, with each group's value."""
    differ = differences([group.runs[0].recipe for group in groups])
    if not differ:
        return element("p", "The recipes are the same, but for seed and folder.", class_="said")
    head = ["key", *(key(group, number) for number, group in enumerate(groups))]
    said = {
        name: values for name, values in differ.items() if not any(other.startswith(f"{name}.") for other in differ)
    }
    rows = [[element("code", name), *(_value(value) for value in values)] for name, values in said.items()]
    found = table(head, rows, "What the recipes differ in", class_="words")
    if len(rows) <= MOST_KEYS:
        return found
    return element("details", element("summary", f"{len(rows)} keys differ"), found)


def _value(value: Any) -> Any:
    return element("span", "–", class_="quiet") if value is None else f"{value}"  # noqa: RUF001


def measured(runs: Sequence[Run]) -> Html:
    """Return what was measured of the texts of the inspections, a column for each run, with standard errors."""
    found = {run.name: (run.inspection or {}).get("measured") or {} for run in runs}
    found = {name: each for name, each in found.items() if each.get("metrics")}
    if not found:
        return Html("")
    there = dict.fromkeys(name for each in found.values() for name in each["metrics"])
    names = [name for name in METRICS if name in there]
    rows = [
        [heading(name), *(with_error(each["metrics"].get(name), name) for each in found.values())]
        for name in [*names, *(name for name in there if name not in names)]
    ]
    counts = ", ".join(f"{each['documents']:,} documents, {each['tokens']:,} tokens" for each in found.values())
    said = f"Figures of these texts, ± standard error over documents ({counts})"
    return element("details", element("summary", "All figures of these texts"), table(["", *found], rows, said))


def with_error(found: dict[str, Any] | None, name: str) -> Any:
    """Return a figure `{"value", "error"}` with its standard error, a dash for none."""
    value, error = (finite((found or {}).get(key)) for key in ("value", "error"))
    said = shown(value, name)
    return said if error is None else joined([said, element("small", f" ± {shown(error, name)}")])


def model_name(section: Any) -> str:
    """Return what a student or teacher of a recipe is called: its model, hub id or folder."""
    if not isinstance(section, dict):
        return "no teacher" if section is None else str(section)
    if members := section.get("members") or section.get("teachers"):
        parts = members.values() if isinstance(members, dict) else members
        return " + ".join(dict.fromkeys(model_name(member) for member in parts))
    for name in ("model", "path", "in_sandbox", "config_from", "url", "cache", "target"):
        if isinstance(section.get(name), str):
            return (
                section[name].rstrip("/").rsplit("/", 1)[-1]
                if section[name].startswith(("/", "~", "."))
                else section[name]
            )
    if isinstance(section.get("source"), dict):
        return model_name(section["source"])
    return str(section.get("name", "?"))


def models(runs: Sequence[Run], role: str) -> str:
    """Return the students or teachers of all runs, each once."""
    return ", ".join(dict.fromkeys(model_name(run.recipe.get(role)) for run in runs))
