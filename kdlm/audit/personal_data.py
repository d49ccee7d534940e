"""What is personal or secret in a text: addresses, numbers of people and accounts, keys.

Own patterns but for phone numbers, where `phonenumbers` knows every country's plan. detect-secrets 1.5.0 (of 2024) was
tried: read as free text, where nothing is quoted, it marks 3,932 of 5,000 lines of the standard library, and it does
not name today's OpenAI, Anthropic, GitHub fine-grained and Google keys. Presidio reads with models of a hub.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address


@dataclass(frozen=True)
class Hit:
    """A stretch of a text: what it is, from `start` up to `end`."""

    kind: str
    start: int
    end: int


def personal(text: str, region: str | None = None) -> list[Hit]:
    """Return what is personal or secret in a text, in order; no two overlap.

    Args:
        region: two letters of a country whose phone numbers are found in their national form too. Without it those
            that begin with `+` are, where `phonenumbers` is installed.

    Raises ImportError when there is a region and no `phonenumbers`, ValueError for a region that does not exist.
    """
    found: list[Hit] = []
    for hit in (*_matches(text), *_phone_numbers(text, region)):
        if all(hit.end <= other.start or other.end <= hit.start for other in found):
            found.append(hit)
    return sorted(found, key=lambda hit: hit.start)


def masked(text: str, hits: Sequence[Hit]) -> str:
    """Return a text with `[kind]` in the place of each of its hits, which are in order and do not overlap."""
    parts, at = [], 0
    for hit in hits:
        parts += [text[at : hit.start], f"[{hit.kind}]"]
        at = hit.end
    return "".join([*parts, text[at:]])


@cache
def finds_phones() -> bool:
    """Say whether phone numbers are found on this machine."""
    return find_spec("phonenumbers") is not None


def entropy(text: str) -> float:
    """Return the bits a character of a text has, by the counts of its own characters."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _random(text: str) -> bool:
    """A key is drawn at random: it has digits, letters and few repetitions, as words and numbers have not."""
    return any(map(str.isdigit, text)) and any(map(str.isalpha, text)) and entropy(text) >= 3.3


def _luhn(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = (2 * digit - 9 * (digit > 4) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _card(text: str) -> bool:
    """Luhn lets one number in ten through, so the first digits must be an issuer's, and the length its own."""
    return bool(ISSUED.fullmatch(re.sub(r"\D", "", text))) and _luhn(text)


def _iban(text: str) -> bool:
    compact = text.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _public(text: str) -> bool:
    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def _somebody(text: str) -> bool:
    """`git@` is a service's, and the domains that RFC 2606 keeps for examples are nobody's."""
    return text != "git"


ISSUED = re.compile(r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}")
_PEM = r"(?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"

KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool] | None]] = {
    "private key": (re.compile(rf"-----BEGIN {_PEM}(?:[\s\S]{{0,10000}}?-----END {_PEM})?"), None),
    "AWS key": (re.compile(r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"), None),
    "model provider key": (re.compile(r"\bsk-[\w-]{20,}"), _random),  # OpenAI's, Anthropic's and others'
    "GitHub token": (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"), None),
    "Google key": (re.compile(r"\bAIza[\w-]{35}"), None),
    "Slack token": (re.compile(r"\bxox[abeoprs]-[\w-]{10,}|\bhooks\.slack\.com/services/[\w/]{20,}"), None),
    "Hugging Face token": (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), None),
    "JSON web token": (re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), None),
    "secret": (
        re.compile(
            r"(?i:key|secret|token|passw(?:or)?d|pwd|credentials?)\b[\"']?(?:\s*[:=]{1,2}\s*|\s+(?:is|was)\s+)[\"'`]?"
            r"(?P<it>[A-Za-z0-9+/_=-]{16,})"
        ),
        _random,
    ),
    "email": (
        re.compile(
            r"(?<![\w.+%-])(?P<it>[\w.+%-]{1,64})@(?!example\.(?:com|org|net)\b)[\w-]{1,63}(?:\.[\w-]{1,63})*?"
            r"\.[A-Za-z]{2,24}\b"
        ),
        _somebody,
    ),
    "IBAN": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    "card number": (re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])"), _card),
    "IP address": (
        re.compile(r"(?<![\w.:/])(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]*:[0-9A-Fa-f:]{4,})(?![\w.:])"),
        _public,
    ),
}
"""Kind -> its pattern (only the group `it` is masked, where there is one) and what else must hold, most telling first.
The domain of an e-mail address stays, because that is what an injected one is known by; so do hosts of links."""


def _matches(text: str) -> Iterator[Hit]:
    for kind, (pattern, holds) in KINDS.items():
        for match in pattern.finditer(text):
            start, end = match.span("it" if "it" in pattern.groupindex else 0)
            if holds is None or holds(text[start:end]):
                yield Hit(kind, start, end)


PHONE = "phone number"
_WITH_PLUS = re.compile(r"\+\d[\d ().\-/]{5,}\d")


def _phone_numbers(text: str, region: str | None) -> Iterator[Hit]:
    if region is None and not (_WITH_PLUS.search(text) and finds_phones()):
        return
    try:
        from phonenumbers import SUPPORTED_REGIONS, PhoneNumberMatcher
    except ImportError as error:
        raise ImportError("phone numbers of a region need phonenumbers: pip install 'kdlm[audit]'") from error
    if region is not None and region not in SUPPORTED_REGIONS:
        raise ValueError(f"region {region!r}: expected the two capitals of a country, such as US or DE")
    for match in PhoneNumberMatcher(text, region):
        yield Hit(PHONE, match.start, match.end)
