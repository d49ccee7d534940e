"""`kdlm_entities`: strict micro F1 of named entities, each answered as a JSON list of the mentions of one type."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def counts(doc: dict[str, Any], results: list[str]) -> dict[str, tuple[int, ...] | float]:
    """Return what one document gives to each metric, and whether its answer is `malformed`.

    `f1` gets (right, given, asked) mentions, `precision` (right, given) and `recall` (right, asked). A given mention is
    right if its text is letter for letter one that was asked for; each counts as often as it is there. An answer that
    is not one JSON list of texts is malformed: it gives no mention, so all are missed.
    """
    (text,) = results
    asked, given = Counter(json.loads(doc["answer"])), mentions(text)
    found = Counter(given)
    right = (asked & found).total()
    return {
        "f1": (right, found.total(), asked.total()),
        "precision": (right, found.total()),
        "recall": (right, asked.total()),
        "malformed": float(given is None),
    }


def mentions(text: str) -> list[str] | None:
    """Return the texts of a JSON list, None if the whole answer is not one."""
    try:
        found = json.loads(text.replace("<|im_end|>", "").strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def f1(documents: Iterable[Sequence[int]]) -> float:
    """Return micro F1, `2 right / (given + asked)`, of counts summed over documents; 0 where there was nothing."""
    right, given, asked = _summed(documents)
    return 2 * right / max(given + asked, 1)


def share(documents: Iterable[Sequence[int]]) -> float:
    """Return precision `right / given`, or recall `right / asked`, of counts summed over documents; 0 of nothing."""
    right, of = _summed(documents)
    return right / max(of, 1)


def _summed(documents: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*documents, strict=True))
