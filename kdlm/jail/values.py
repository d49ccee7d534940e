"""Values: whether two texts, as `repr` writes them, stand for the same value."""

import ast
import math
from typing import Any

CLOSE = 1e-9
"""Relative difference of floats that are the same: another order of the same sums."""


def same(said: str, expected: str) -> bool:
    """Equal texts, or equal literals of the same types, floats within `CLOSE`."""
    if said == expected:
        return True
    try:
        return _same(ast.literal_eval(said), ast.literal_eval(expected))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):  # no literal; nested too deep
        return False


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=CLOSE) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    return one == other
