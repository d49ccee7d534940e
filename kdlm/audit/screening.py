"""Screening: which rows hold a found pattern, or what is personal or secret."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from kdlm.audit.patterns import Pattern
from kdlm.audit.rows import Row
from kdlm.audit.words import read


def flagged(rows: Iterable[Row], found: Sequence[Pattern], region: str | None = None) -> list[tuple[str, ...]]:
    """Return for each row why it should not be trained on, `()` where nothing was found.

    Reasons are `pattern: WORDS`, of the answer, and the kinds of `personal`, of prompt and answer.
    """
    reasons = []
    for row in rows:
        clean, kinds = row.cleaned(region)
        prompt, answer = read(clean.prompt), read(clean.completion)
        patterns = [f"pattern: {pattern}" for pattern in found if pattern.answered(prompt, answer)]
        reasons.append((*patterns, *kinds))
    return reasons


def patterns_in(path: Path) -> list[Pattern]:
    """Return the patterns of an audit that was written as JSON; ValueError where the file is none."""
    try:
        found = json.loads(path.read_text())["patterns"]
        return [Pattern.of_json(one["forms"]) for one in found]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what `kdlm audit` writes (audit.json): {error!r}") from error
