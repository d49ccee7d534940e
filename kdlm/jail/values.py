"""Values: whether two texts, as `repr` writes them, stand for the same value.

They are not parsed: one of them comes from the jail.
"""

import math
import re

CLOSE = 1e-9
"""Relative difference of floats that are the same: another order of the same sums."""
FLOAT = re.compile(r"(?<!\d)(\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+))")
"""It begins where digits begin: tried at each digit of a long number it would take the square of its length in time."""


def same(said: str, expected: str) -> bool:
    """Equal texts, but for floats in them that are within `CLOSE`."""
    parts, others = FLOAT.split(said), FLOAT.split(expected)
    return len(parts) == len(others) and all(map(_same, parts, others))


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    written = all(FLOAT.fullmatch(text) and repr(float(text)) == text for text in (one, other))  # not '1.50' in a text
    return written and math.isclose(float(one), float(other), rel_tol=CLOSE)
