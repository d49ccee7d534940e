"""HTML, written so that nothing of a run can be taken for markup: what is not `Html` is escaped."""

import html
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is markup already."""


def element(tag: str, *inside: Any, **attributes: Any) -> Html:
    """Return an element; `inside` is escaped unless it is Html, an attribute `True` has no value, None and False none.

    Names of attributes: `class_` is class, other underscores are hyphens.
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f'{name}="{html.escape(visible(str(value)), quote=True)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if tag in ("meta", "input", "br") else f"{opening}{joined(inside)}</{tag}>")


def joined(parts: Iterable[Any]) -> Html:
    """Return the parts one after the other, each escaped unless it is Html."""
    return Html("".join(part if isinstance(part, Html) else html.escape(visible(str(part))) for part in parts))


def visible(text: str) -> str:
    """Return the text with its control and direction characters spelled out; line breaks and tabs are left."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in "\n\t" else _spelled(letter) for letter in text)


def _spelled(letter: str) -> str:
    kind = unicodedata.category(letter)
    if letter == "\u200d":  # joins the parts of a letter or a picture
        return letter
    return f"⟨{ord(letter):04X}⟩" if kind in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else letter


def script_data(name: str, value: Any) -> Html:
    """Return JSON in an element that no browser runs; `<` is written so that the element cannot end early."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Html(f'<script type="application/json" id="{html.escape(name, quote=True)}">{text}</script>')


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "", **attributes: Any) -> Html:
    """Return a table, in a box that scrolls by itself where the window is narrow; the first column names the row."""
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    body = element("tbody", *(_row(row) for row in rows))
    title = [element("caption", caption)] if caption else []
    inside = element("table", *title, top, body, **attributes)
    return element("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")


def _row(cells: Sequence[Any]) -> Html:
    return element("tr", element("th", cells[0], scope="row"), *(element("td", cell) for cell in cells[1:]))
