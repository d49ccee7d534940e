"""Colours and type of the report, once for the page (CSS) and for its figures (Vega), for light and for dark."""

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"

LIGHT = {
    "paper": "#fcfcfa",
    "ink": "#1c1c1a",
    "quiet": "#5c5c57",
    "rule": "#deded8",
    "wash": "#f2f2ee",
    "focus": "#0b5cad",
}
DARK = {
    "paper": "#161715",
    "ink": "#e9e8e3",
    "quiet": "#a5a59d",
    "rule": "#373833",
    "wash": "#20211e",
    "focus": "#7db8f5",
}
SERIES = {
    "light": ["#0b5cad", "#b0440c", "#1a7446", "#86408f", "#7a6200", "#a8234a", "#0b6e76", "#57534a"],
    "dark": ["#74b3f3", "#f0966a", "#63c596", "#cf97da", "#d5ba55", "#f08aa6", "#5fc4cc", "#b8b3a6"],
}
"""Colours of runs, each readable as text on the paper (contrast of at least 4.5)."""

HEAT = {"light": "#e8622f", "dark": "#ad3d10"}
"""The last level of the heat map's scale, whose first is the paper; the ink can be read on all of them."""
LEVELS = 8
"""Steps of the heat map's scale."""


def palette(dark: bool) -> dict[str, str]:
    """Return the named colours of the page: the basic ones, `series-0` ... and `heat-0` ..."""
    scheme = "dark" if dark else "light"
    colours = dict(DARK if dark else LIGHT)
    colours |= {f"series-{number}": colour for number, colour in enumerate(SERIES[scheme])}
    shares = [level / (LEVELS - 1) for level in range(LEVELS)]
    colours |= {f"heat-{n}": _between(colours["paper"], HEAT[scheme], share) for n, share in enumerate(shares)}
    return colours


def stylesheet() -> str:
    """Return the colours as CSS variables, each of which knows its light and its dark value."""
    light, dark = palette(False), palette(True)
    lines = [f"  --{name}: light-dark({light[name]}, {dark[name]});" for name in light]
    heat = [f'[data-level="{level}"] {{ background: var(--heat-{level}); }}' for level in range(LEVELS)]
    series = [f".series-{number} {{ color: var(--series-{number}); }}" for number in range(len(SERIES["light"]))]
    return "\n".join([":root {", *lines, "}", *heat, *series])


def config(dark: bool) -> dict[str, Any]:
    """Return the Vega-Lite config of a scheme: what a figure's spec leaves to the page that shows it."""
    colours = palette(dark)
    quiet = {"labelColor": colours["quiet"], "titleColor": colours["quiet"], "labelFontSize": 11, "titleFontSize": 11}
    return {
        "background": colours["paper"],
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": SERIES["dark" if dark else "light"]},
        "axis": {
            **quiet,
            "titleFontWeight": "normal",
            "domainColor": colours["rule"],
            "tickColor": colours["rule"],
            "gridColor": colours["rule"],
            "gridOpacity": 0.6,
            "tickSize": 4,
            "labelPadding": 4,
        },
        "axisX": {"grid": False, "labelFlush": False},
        "axisY": {"domain": False, "ticks": False, "tickCount": 4},
        "legend": {**quiet, "titleFontWeight": "normal", "symbolStrokeWidth": 1.5},
        "title": {"color": colours["ink"], "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
        "text": {"color": colours["ink"], "fontSize": 11},
        "rule": {"color": colours["quiet"]},
        "mark": {"color": colours["series-0"]},
    }


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours `#rrggbb`, 1 to 21 (WCAG 2.2, relative luminance)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _between(one: str, other: str, share: float) -> str:
    mixed = (a + (b - a) * share for a, b in zip(_channels(one), _channels(other), strict=True))
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in mixed)


def _channels(colour: str) -> list[float]:
    return [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
