"""The page: one HTML file, readable without network, whose policy forbids it to ask for anything."""

import base64
import hashlib
import math
from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from typing import Any

from kdlm import __version__
from kdlm.metrics import metric
from kdlm.report import look
from kdlm.report.comparison import comparison, measured, models, recipes
from kdlm.report.evaluation import evaluation
from kdlm.report.figures import curves, gaps, mixture, reliability, resources
from kdlm.report.groups import Group, comparable, grouped
from kdlm.report.heat_map import heat_map
from kdlm.report.markup import Html, element, joined, script_data
from kdlm.report.numbers import shown
from kdlm.report.panel import Spec
from kdlm.report.reproduce import dropped, reproduce
from kdlm.report.run import Run
from kdlm.report.verdict import verdict

NO_GAP = "It needs two evaluations of the held-out cross-entropy, the student's and the teacher's."
FACTS = ("cross_entropy", "kl_to_teacher", "top1_agreement", "accuracy")


def page(runs: Sequence[Run], bundle: str, jobs: dict[str, dict[str, Any]] | None = None) -> str:
    """Return the page of these runs.

    Args:
        bundle: the JavaScript of Vega, Vega-Lite and Vega-Embed.
        jobs: results of `kdlm eval` to show with them, by name.
    """
    groups = grouped(runs)
    title = f"{models(runs, 'student')} from {models(runs, 'teacher')}"
    sections, specs = _sections(runs, groups, jobs or {})
    links = (element("li", element("a", heading, href=f"#{name}")) for name, heading, _ in sections)
    body = [
        element("a", "Skip to the figures", href="#main", class_="skip"),
        _header(runs, groups),
        element("nav", element("ul", *links), aria_label="contents"),
        element("main", *(_section(*section) for section in sections), id="main", tabindex="-1"),
        element(
            "footer",
            f"kdlm {__version__}, {date.today().isoformat()}. Losses and divergences are in nats, per token or image.",
        ),
        element("div", id="tip", hidden=True),
        element("noscript", element("p", "The figures and their numbers need JavaScript.")),
        script_data("specs", specs),
        script_data("schemes", {"light": look.config(False), "dark": look.config(True)}),
    ]
    scripts = [read("heat_map.js"), read("page.js")]
    style = f"{read('page.css')}\n{look.stylesheet()}\n"
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {' '.join(_hash(script) for script in [*scripts, bundle])}",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = [
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: kdlm report"),
        Html(f"<style>{style}</style>"),
    ]
    ends = [Html(f"<script>{script}</script>") for script in scripts]
    ends.append(Html(f'<script type="module">{bundle}</script>'))
    return f'<!doctype html>\n<html lang="en">\n{element("head", *head)}\n{element("body", *body, *ends)}\n</html>\n'


def read(name: str) -> str:
    """Return a file of this package."""
    return (files("kdlm.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


Content = tuple[str, str, Html]


def _sections(
    runs: Sequence[Run], groups: Sequence[Group], jobs: dict[str, dict[str, Any]]
) -> tuple[list[Content], dict[str, Spec]]:
    """Return anchor, heading and content of each section, and all specs by name."""
    lines, gap, bins = curves(groups), gaps(groups), reliability(runs)
    cost, sources = resources(groups), mixture(runs)
    sections = [
        ("comparison", "Comparison" if len(runs) > 1 else "Figures", comparison(groups)),
        ("tokens", "Token by token", _tokens(runs)),
        ("recipes", "Recipes", recipes(groups)),
        ("curves", "Training", _curves(lines)),
        ("gap", "Gap closed", _figures(gap, NO_GAP)),
        ("reliability", "Calibration", _figures(bins, "It needs an inspection: see Token by token.")),
        ("resources", "Speed and memory", _figures(cost, "Neither throughput nor memory was logged.")),
        ("data", "Data", joined([_figures(sources, "data.json of the runs names no sources."), dropped(runs)])),
        ("reproduce", "Reproduce", reproduce(runs)),
        ("evaluation", "Evaluation", evaluation(jobs)),
    ]
    left_out = {"recipes": len(groups) < 2, "evaluation": not jobs}
    return [section for section in sections if not left_out.get(section[0])], lines | gap | bins | cost | sources


def _section(name: str, heading: str, content: Html) -> Html:
    return element("section", element("h2", heading, id=f"h-{name}"), content, id=name, aria_labelledby=f"h-{name}")


def _missing(why: str) -> Html:
    return element("p", why, class_="said")


def _tokens(runs: Sequence[Run]) -> Html:
    missing = [run.name for run in runs if not (run.inspection or {}).get("texts")]
    if len(missing) == len(runs):
        return _missing("No run was inspected: only finished runs of text are, unless --no-inspect is given.")
    said = (
        "Each token is coloured by how far the student's prediction of it is from the teacher's, given the text before "
        "it. Point at one, or walk with the arrow keys. Grey tokens are not counted."
    )
    note = f" Not inspected: {', '.join(missing)}." if missing else ""
    return joined([element("p", said + note, class_="said"), heat_map(runs), measured(runs)])


def _curves(specs: dict[str, Spec]) -> Html:
    said = "Thin lines: training. Lines with dots: held-out data."
    return joined([element("p", said, class_="said") if specs else "", _figures(specs, "Nothing was logged yet.")])


def _figures(specs: dict[str, Spec], otherwise: str) -> Html:
    if not specs:
        return _missing(otherwise)
    return element("div", *(figure(name, spec) for name, spec in specs.items()), class_="figures")


def figure(name: str, spec: Spec) -> Html:
    """Return a figure: a plot that the script draws, what it says in words, its numbers, its PNG."""
    meta: dict[str, Any] = spec["usermeta"]
    numbers = element("div", class_="scroll", tabindex="0", role="region", aria_label=f"numbers of {spec['title']}")
    caption = [
        *([element("p", meta["said"])] if meta["said"] else []),
        element("button", "PNG", type="button", data_png=name, aria_label=f"save {spec['title']} as PNG"),
        element("details", element("summary", "Numbers"), numbers, data_numbers=name),
    ]
    short = " short" if spec["height"] < 120 else ""
    words = {"role": "img", "tabindex": "0", "aria_label": spec["description"]}
    canvas = element("div", aria_hidden="true")
    plot = element("div", canvas, class_=f"plot{short}", data_figure=name, **words)
    return element("figure", plot, element("figcaption", *caption))


def _header(runs: Sequence[Run], groups: Sequence[Group]) -> Html:
    count = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    facts = []
    for name in FACTS if comparable(groups) else ():
        finals = [(f.value, group) for group in groups if (f := group.final(name)) and math.isfinite(f.value)]
        if finals:
            value, best = max(finals, key=lambda pair: metric(name).better * pair[0])
            unit = f"{metric(name).unit}{f', {best.label}' if len(groups) > 1 else ''}"
            facts.append(element("div", element("dt", f"{'best ' * (len(groups) > 1)}{metric(name).title}"),
                                 element("dd", shown(value, name), " ", element("small", unit))))  # fmt: skip
    title = element("h1", models(runs, "student"), element("span", " from ", class_="quiet"), models(runs, "teacher"))
    return element(
        "header",
        element("p", f"kdlm report, {count}", class_="kicker"),
        element("button", "Dark", type="button", id="scheme", aria_label="switch between light and dark"),
        title,
        element("p", verdict(groups), class_="verdict"),
        element("dl", *facts, class_="facts") if facts else "",
    )
