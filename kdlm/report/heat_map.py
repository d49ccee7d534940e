"""The heat map: tokens of sample texts, coloured by how far the student is from the teacher at each."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from kdlm.estimates import finite
from kdlm.report.markup import Html, element, joined, script_data, visible
from kdlm.report.numbers import plain
from kdlm.report.run import Run

MEASURES = {
    "kl_to_teacher": "KL(teacher ‖ student)",
    "reverse_kl_to_teacher": "KL(student ‖ teacher)",
    "cross_entropy": "cross-entropy of the student",
}
"""What tokens may be coloured by, in nats; the first that there is comes first."""

TOP = 0.98
"""Share of all tokens below the darkest level."""
MOST_TOKENS = 5000
"""Tokens of all runs together, so that the page stays small; the rest of a text is said to be left out."""
LEAST_TOKENS = 64
"""Tokens of a text; where even these are too many, fewer texts of each run are shown."""
OPEN = 3
"""Texts that are seen at once; the others are folded."""
SIGNS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}

Inspection = dict[str, Any]


def heat_map(runs: Sequence[Run]) -> Html:
    """Return the section's content: choice of run and measure, scale, texts, the panel of one token, the data.

    At least one of the runs has been inspected. The scale of a measure is the same for all of them.
    """
    there = [(run, run.inspection) for run in runs if run.inspection and run.inspection.get("texts")]
    count = max(1, MOST_TOKENS // LEAST_TOKENS // len(there))
    inspected = [(run, found | {"texts": found["texts"][:count]}) for run, found in there]
    most = max(LEAST_TOKENS, MOST_TOKENS // sum(len(found["texts"]) for _, found in inspected))
    values = {name: [value for _, found in inspected for value in _values(found, name)] for name in MEASURES}
    scales = {name: edges(each) for name, each in values.items() if each}
    bodies = [_texts(found, scales, most) for _, found in inspected]
    choices = [_choice("run", "Run", [(str(number), run.name) for number, (run, _) in enumerate(inspected)])]
    choices = choices if len(inspected) > 1 else []
    data = {
        "measures": [MEASURES[name] for name in scales],
        "edges": list(scales.values()),
        "runs": [_data(found, scales, most) for _, found in inspected],
    }
    aside = element("aside", element("p", "Choose a token.", class_="quiet"), id="token", aria_label="token")
    fewer = any(len(found["texts"]) > count for _, found in there)
    shown = f"The first {count} text{'s' * (count > 1)} of each run are shown." if fewer else ""
    measure = _choice("measure", "Colour", [(name, MEASURES[name]) for name in scales])
    return joined(
        [
            element("form", *choices, measure, class_="controls"),
            _scale(next(iter(scales.values()), ())),
            element("div", element("div", bodies[0], class_="texts", id="texts"), aside, class_="heat"),
            element("p", shown, class_="quiet") if shown else "",
            element("button", "PNG", type="button", id="save-heat", aria_label="save the texts as PNG"),
            *(element("template", body, id=f"texts-{number}") for number, body in enumerate(bodies)),
            element("p", class_="unseen", id="said", aria_live="polite"),
            script_data("token-data", data),
        ]
    )


def edges(values: Sequence[float]) -> list[float]:
    """Return the lower ends of the levels 1 to 7, growing as squares: most tokens are close, a few are far.

    98 % of the values lie below the last. Two digits each.
    """
    top = max(sorted(values)[min(len(values) - 1, int(TOP * len(values)))], 1e-6)
    return [float(f"{top * (number / 7) ** 2:.2g}") for number in range(1, 8)]


def level(value: float | None, ends: Sequence[float]) -> int | None:
    """Return the level of the scale that a value falls into, 0 to 7; None for no value."""
    return None if value is None else bisect_right(ends, value)


def _values(inspection: Inspection, name: str) -> list[float]:
    tokens = (token for text in inspection["texts"] for token in text["tokens"])
    return [value for token in tokens if (value := finite(token.get(name))) is not None]


def _choice(name: str, title: str, options: Sequence[tuple[str, str]]) -> Html:
    radios = [
        element("label", element("input", type="radio", name=name, value=value, checked=number == 0), " ", said)
        for number, (value, said) in enumerate(options)
    ]
    return element("fieldset", element("legend", title), *radios)


def _scale(ends: Sequence[float]) -> Html:
    steps = (element("li", f"{end:g}", data_level=number) for number, end in enumerate((0, *ends)))
    label = "scale of the colours: lower end of each, in nats per token"
    scale = element("ol", *steps, class_="scale", aria_label=label, id="scale")
    return element("div", scale, element("span", "nats, from", class_="quiet"), class_="legend")


def _texts(inspection: Inspection, scales: dict[str, list[float]], most: int) -> Html:
    texts = [_text(number, text, scales, most) for number, text in enumerate(inspection["texts"])]
    rest = len(texts) - OPEN
    if rest < 1:
        return joined(texts)
    title = f"{rest} more text{'s' * (rest > 1)}"
    return joined([*texts[:OPEN], element("details", element("summary", title), *texts[OPEN:], class_="texts")])


def _text(number: int, text: dict[str, Any], scales: dict[str, list[float]], most: int) -> Html:
    first = next(iter(scales), "")
    spans = []
    for place, token in enumerate(text["tokens"][:most]):
        at = level(_short(token.get(first)), scales.get(first, ()))
        kept = (
            {"role": "option", "tabindex": "-1", "data_token": place} if token.get("kept") else {"aria_hidden": "true"}
        )
        spans.append(element("span", *_letters(token["text"]), data_level=at, **kept))
        spans += [element("br")] * token["text"].endswith("\n")  # outside, or the outline would reach the next line
    left = len(text["tokens"]) - most
    cut = f"; {left} more tokens are not shown" if left > 0 else ""
    label = f"tokens of {text['place']}; arrow keys go from one to the next"
    return element(
        "article",
        element("h3", text["place"]),
        element("p", summary(text) + cut, class_="quiet"),
        element("div", *spans, role="listbox", aria_label=label, class_="text", data_text=number, dir="ltr"),
    )


def summary(text: dict[str, Any]) -> str:
    """Return how many tokens of a text count, and the means over them."""
    said = [f"{sum(bool(token.get('kept')) for token in text['tokens'])} tokens"]
    for name, short in (("kl_to_teacher", "KL"), ("reverse_kl_to_teacher", "reverse KL"), ("cross_entropy", "loss")):
        values = _values({"texts": [text]}, name)
        said += [f"{short} {plain(sum(values) / len(values))}"] if values else []
    return ", ".join(said)


def marked(text: str) -> str:
    """Return a token in one line, its white space to be seen."""
    return visible("".join(SIGNS.get(letter, letter) for letter in text))


def _letters(text: str) -> Iterator[Any]:
    """Yield a token's text with its white space to be seen; a line break is shown, and made where it is not the end."""
    word = ""
    for at, letter in enumerate(text, start=1):
        if letter not in SIGNS:
            word += letter
            continue
        if word:
            yield word
            word = ""
        yield element("i", SIGNS[letter])
        if letter == "\n" and at < len(text):
            yield element("br")
    if word:
        yield word


def _data(inspection: Inspection, names: Sequence[str] | dict[str, Any], most: int) -> list[list[Any]]:
    """Return for each text its tokens: the text, the measures' values, the teacher's and the student's top tokens."""
    return [
        [
            [
                marked(token["text"]),
                [_short(token.get(name)) for name in names],
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
    return None if number is None else float(f"{number:.6g}")
