"""Texts: what completions are like, counted over their tokens."""

from collections.abc import Sequence

Ids = Sequence[int]
"""The tokens of one completion."""


def distinct(completions: Sequence[Ids], n: int) -> float:
    """Return distinct-n: the number of different n-grams of all completions, over that of all n-grams; 0 without any.

    n-grams are of tokens and inside a completion (Li et al. 2016, arXiv 1510.03055, who count words and divide by all
    of these). It falls with the number of tokens: compare it at equal numbers of completions and like lengths.
    """
    grams = [gram for one in completions for gram in _grams(one, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(completion: Ids, n: int = 4) -> float:
    """Return rep-n: the share of a completion's n-grams that it had before; 0 without any (arXiv 1908.04319)."""
    return 1 - distinct([completion], n) if len(completion) >= n else 0.0


def text_figures(completions: Sequence[Ids], truncated: Sequence[bool]) -> dict[str, float]:
    """Return means over completions, by the names that logs use; nothing without completions.

    `length` in tokens, `truncated`, the share that was cut at its limit, `repetition_4`; and `distinct_1`,
    `distinct_2`, of all of them together.
    """
    if not completions:
        return {}
    count = len(completions)
    return {
        "length": sum(map(len, completions)) / count,
        "truncated": sum(truncated) / count,
        "repetition_4": sum(map(repetition, completions)) / count,
        "distinct_1": distinct(completions, 1),
        "distinct_2": distinct(completions, 2),
    }


def _grams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
