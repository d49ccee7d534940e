"""Words: how two texts are compared where case, spacing and punctuation do not matter."""

import json
import re
import unicodedata
from collections import Counter
from typing import Any

from kdlm.audit.words import ALONE
from kdlm.curation.step import as_prompt

_WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+")
_KEPT = re.compile(
    rf"[{ALONE}]|[^\W_{ALONE}]+|[^\s.,;:?'\"$\u2018\u2019\u201c\u201d\u3001\u3002\uff0c\uff1a\uff1b\uff1f]"
)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def texts_of(value: Any, *, system: bool = True) -> list[str]:
    """Return the texts that a column of a row holds: one, or that of each message; `system` messages among them."""
    if value is None:
        return []
    messages = as_prompt(value) if isinstance(value, str) else value
    if not isinstance(messages, list):
        return [str(messages)]
    told = [one for one in messages if system or not isinstance(one, dict) or one.get("role") != "system"]
    return [text if isinstance(text := _content(one), str) else json.dumps(text) for one in told]


def _content(message: Any) -> Any:
    return message.get("content") or "" if isinstance(message, dict) else message


def words(text: str) -> list[str]:
    """Return the runs of letters and digits, without their case."""
    return _WORD.findall(_folded(text))


def normal(text: str) -> str:
    """Return what two texts have in common that say the same: words and signs, without case, spacing and the
    punctuation of sentences. `3 + 5` and `3 - 5`, or `(2 + 3) * 4` and `2 + (3 * 4)`, stay apart.
    """
    return " ".join(_KEPT.findall(_folded(text)))


def ngrams(text: str, length: int) -> list[str]:
    """Return the runs of so many words, in their order."""
    found = words(text)
    return [" ".join(found[at : at + length]) for at in range(len(found) - length + 1)]


def numbers(text: str) -> Counter[str]:
    """Return the numbers in digits, and how often each stands there."""
    return Counter(one.replace(",", "") for one in _NUMBER.findall(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
