"""`kdlm_entities`: strict micro F1 of named entities, each answered as a JSON list of the mentions of one type."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

Counts = tuple[int, int, int]
"""True positives, false positives and false negatives, of a document or summed over documents."""


def counts(doc: dict[str, Any], results: list[str]) -> dict[str, Counts | float]:
    """Return the document's counts for `f1`, `precision` and `recall`, and whether the answer is `malformed`.

    A predicted mention is right if its text is letter for letter one that was asked for; each counts as often as it
    is given. An answer that is not one JSON list of texts is malformed: it gives no mention, so all are missed.
    """
    (text,) = results
    asked = Counter(json.loads(doc["answer"]))
    given = mentions(text)
    right = asked & Counter(given or [])
    tp = right.total()
    document = (tp, len(given or []) - tp, asked.total() - tp)
    return {"f1": document, "precision": document, "recall": document, "malformed": float(given is None)}


def mentions(text: str) -> list[str] | None:
    """Return the texts of a JSON list, None if the whole answer is not one."""
    try:
        found = json.loads(text.replace("<|im_end|>", "").strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def f1(documents: Sequence[Counts]) -> float:
    """Return `2 tp / (2 tp + fp + fn)` of the counts summed over documents; 0 where nothing was asked or given."""
    tp, fp, fn = _summed(documents)
    return _share(2 * tp, 2 * tp + fp + fn)


def precision(documents: Sequence[Counts]) -> float:
    """Return `tp / (tp + fp)` of the counts summed over documents; 0 where nothing was given."""
    tp, fp, _ = _summed(documents)
    return _share(tp, tp + fp)


def recall(documents: Sequence[Counts]) -> float:
    """Return `tp / (tp + fn)` of the counts summed over documents; 0 where nothing was asked."""
    tp, _, fn = _summed(documents)
    return _share(tp, tp + fn)


def _summed(documents: Sequence[Counts]) -> tuple[float, ...]:
    return tuple(sum(column) for column in zip(*documents, strict=True))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
