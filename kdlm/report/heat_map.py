"""The heat map: tokens of sample texts, coloured by how far the student is from the teacher at each."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from kdlm.report.markup import Html, element, joined, script_data, visible
from kdlm.report.metrics import plain
from kdlm.report.run import Run, finite

MEASURES = {
    "kl_to_teacher": "KL(teacher ‖ student)",
    "reverse_kl_to_teacher": "KL(student ‖ teacher)",
    "cross_entropy": "student's loss",
}
"""What tokens may be coloured by, in nats; the first that there is comes first."""

EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 6.0)
"""Lower ends of the levels 1, 2, ... of the scale, in nats: the same for every run, so that two can be compared."""

MOST_TOKENS = 12_000
"""Tokens of all runs together, so that the page stays small; the rest of a text is said to be left out."""


def heat_map(runs: Sequence[Run]) -> Html:
    """Return the section's content: choice of run and measure, scale, texts, the panel of one token, the data."""
    share = max(64, MOST_TOKENS // max(1, sum(len(run.inspection["texts"]) for run in runs if run.inspection)))
    inspected = [(run, run.inspection) for run in runs if run.inspection]
    measures = [name for name in MEASURES if any(_has(found, name) for _, found in inspected)]
    bodies = [_texts(found, measures, share) for _, found in inspected]
    choice = _choice("run", "Run", [(str(number), run.name) for number, (run, _) in enumerate(inspected)])
    controls = [choice] if len(inspected) > 1 else []
    controls.append(_choice("measure", "Colour", [(name, MEASURES[name]) for name in measures]))
    data = {"measures": {name: MEASURES[name] for name in measures}, "edges": EDGES}
    data["runs"] = [_data(found, measures, share) for _, found in inspected]
    return joined(
        [
            element("form", *controls, class_="controls"),
            _scale(),
            element(
                "div",
                element("div", bodies[0], class_="texts", id="texts"),
                element("aside", element("p", "Choose a token.", class_="quiet"), id="token", aria_label="token"),
                class_="heat",
            ),
            *(element("template", body, id=f"texts-{number}") for number, body in enumerate(bodies)),
            element("p", class_="unseen", id="said", aria_live="polite"),
            element("button", "PNG", type="button", id="save-heat", aria_label="save the texts as PNG"),
            script_data("token-data", data),
        ]
    )


def level(value: float | None) -> int | None:
    """Return the level of the scale that a value in nats falls into, 0 to 7; None for no value."""
    return None if value is None else bisect_right(EDGES, value)


def _has(inspection: dict[str, Any], name: str) -> bool:
    return any(finite(token.get(name)) is not None for text in inspection["texts"] for token in text["tokens"])


def _choice(name: str, title: str, options: Sequence[tuple[str, str]]) -> Html:
    radios = [
        element("label", element("input", type="radio", name=name, value=value, checked=number == 0), " ", said)
        for number, (value, said) in enumerate(options)
    ]
    return element("fieldset", element("legend", title), *radios)


def _scale() -> Html:
    ends = ("0", *(f"{edge:g}" for edge in EDGES))
    steps = (element("li", end, data_level=number) for number, end in enumerate(ends))
    return element("ol", *steps, class_="scale", aria_label="scale of the colours: lower end of each, in nats per token")


def _texts(inspection: dict[str, Any], measures: Sequence[str], most: int) -> Html:
    return joined(_text(number, text, measures, most) for number, text in enumerate(inspection["texts"]))


def _text(number: int, text: dict[str, Any], measures: Sequence[str], most: int) -> Html:
    shown = text["tokens"][:most]
    spans = []
    for place, token in enumerate(shown):
        value = finite(token.get(measures[0])) if measures else None
        kept = {"role": "option", "tabindex": "-1", "data_token": place} if token.get("kept") else {"aria_hidden": "true"}
        spans.append(element("span", *_letters(token["text"]), data_level=level(value), **kept))
    title = [element("h3", text["place"]), element("p", summary(text, measures), class_="quiet")]
    if len(shown) < len(text["tokens"]):
        title.append(element("p", f"The first {len(shown)} of {len(text['tokens'])} tokens.", class_="quiet"))
    label = f"tokens of {text['place']}; arrow keys go from one to the next"
    box = element("div", *spans, role="listbox", aria_label=label, class_="text", data_text=number, dir="ltr")
    return element("article", *title, box)


def summary(text: dict[str, Any], measures: Sequence[str]) -> str:
    """Return the means of a text over all tokens that count."""
    said = [f"{sum(bool(token.get('kept')) for token in text['tokens'])} tokens"]
    for name in measures:
        values = [value for token in text["tokens"] if (value := finite(token.get(name))) is not None]
        if values:
            said.append(f"mean {MEASURES[name]} {plain(sum(values) / len(values))}")
    return ", ".join(said)


SIGNS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


def marked(text: str) -> str:
    """Return a token in one line, its white space to be seen."""
    return visible("".join(SIGNS.get(letter, letter) for letter in text))


def _letters(text: str) -> Iterator[Any]:
    """Yield a token's text with its white space to be seen; a line break is shown, and then made."""
    plain_part = ""
    for letter in text:
        if letter not in SIGNS:
            plain_part += letter
            continue
        if plain_part:
            yield plain_part
            plain_part = ""
        yield element("i", SIGNS[letter])
        if letter == "\n":
            yield element("br")
    if plain_part:
        yield plain_part


def _data(inspection: dict[str, Any], measures: Sequence[str], most: int) -> list[list[Any]]:
    """Return for each text its tokens: the text, the measures' values, the teacher's and the student's top tokens."""
    return [
        [
            [
                marked(token["text"]),
                [_short(token.get(name)) for name in measures],
                _top(token, "teacher"),
                _top(token, "student"),
            ]
            if token.get("kept")
            else None
            for token in text["tokens"][:most]
        ]
        for text in inspection["texts"]
    ]


def _top(token: dict[str, Any], who: str) -> list[list[Any]]:
    return [[marked(word), _short(probability)] for word, probability in token.get(who) or []]


def _short(value: Any) -> float | None:
    number = finite(value)
    return None if number is None else float(f"{number:.5g}")
