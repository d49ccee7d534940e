"""`kdlm_entities`: strict micro F1 of named entities, each answered as a JSON list of the mentions of one type."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

Counts = tuple[int, int, int]
"""True positives, false positives and false negatives."""


def counts(doc: dict[str, Any], results: list[str]) -> dict[str, Counts | float]:
    """Return a document's counts, for each of `f1`, `precision` and `recall`, and whether its answer is `malformed`.

    A mention is right if its text is letter for letter one that was asked for; each counts as often as it is there. An
    answer that is not one JSON list of texts is malformed: it gives no mention, so all are missed.
    """
    (text,) = results
    asked, given = Counter(json.loads(doc["answer"])), mentions(text)
    found = Counter(given)
    of_document = ((asked & found).total(), (found - asked).total(), (asked - found).total())
    return {**dict.fromkeys(("f1", "precision", "recall"), of_document), "malformed": float(given is None)}


def mentions(text: str) -> list[str] | None:
    """Return the texts of a JSON list, None if the whole answer is not one."""
    try:
        found = json.loads(text.replace("<|im_end|>", "").strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def f1(documents: Iterable[Counts | Int[np.ndarray, "3"]]) -> float:
    """Return micro F1, `2 tp / (2 tp + fp + fn)`, of counts summed over documents; 0 where there was nothing."""
    tp, fp, fn = _summed(documents)
    return 2 * tp / max(2 * tp + fp + fn, 1)


def precision(documents: Iterable[Counts | Int[np.ndarray, "3"]]) -> float:
    """Return `tp / (tp + fp)` of counts summed over documents; 0 where nothing was given."""
    tp, fp, _ = _summed(documents)
    return tp / max(tp + fp, 1)


def recall(documents: Iterable[Counts | Int[np.ndarray, "3"]]) -> float:
    """Return `tp / (tp + fn)` of counts summed over documents; 0 where nothing was asked for."""
    tp, _, fn = _summed(documents)
    return tp / max(tp + fn, 1)


def _summed(documents: Iterable[Counts | Int[np.ndarray, "3"]]) -> Counts:
    tp, fp, fn = (int(sum(column)) for column in zip(*documents, strict=True))
    return tp, fp, fn
