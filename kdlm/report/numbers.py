"""Figures as the page writes them."""

import math
from typing import Any

from kdlm.metrics import metric
from kdlm.report.run import is_number


def shown(value: Any, name: str = "") -> str:
    """Return a figure in the unit of its metric, in three or four digits, one after the point of a percent.

    A dash for none; what is not finite is said to be so.
    """
    if not is_number(value):
        return "–"  # noqa: RUF001
    if not math.isfinite(value):
        return "not finite"
    known = metric(name)
    return f"{known.scale * value:.1f}" if known.unit == "%" else plain(known.scale * value)


def plain(value: float) -> str:
    """Return four digits of a finite number, thousands apart, very small and very large ones with an exponent."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 1000 or (size >= 100 and value == round(value)):
        return f"{value:,.0f}"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.{max(1, 3 - math.floor(math.log10(max(1.0, size))))}f}"
