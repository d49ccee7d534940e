"""What is personal or secret in a text: addresses, numbers of people and accounts, keys.

Own patterns but for phone numbers, where `phonenumbers` knows every country's plan. detect-secrets 1.5.0 (of 2024) was
tried: read as free text, where nothing is quoted, it marks 3,932 of 5,000 lines of the standard library, and it does
not name today's OpenAI, Anthropic, GitHub fine-grained and Google keys. Presidio reads with models of a hub.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address

from kdlm.audit.words import ALONE


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
        place = bisect_left(found, hit.end, key=lambda other: other.start)  # those before it begin before its end
        if place == 0 or found[place - 1].end <= hit.start:
            found.insert(place, hit)
    return found


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
    """A key is drawn at random: it has digits, letters and few repetitions, as words, numbers and names in code have
    not."""
    drawn = any(map(str.isdigit, text)) and any(map(str.isalpha, text)) and entropy(text) >= 3.3
    return drawn and not NAME_IN_CODE.fullmatch(text)


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
    """Slices (`[::1000]`) and versions read as addresses: of those with colons, 2000::/3 alone is given to anybody."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and (address.version == 4 or address.packed[0] >> 5 == 1)


def _somebody(text: str) -> bool:
    """`git@` is a service's, and the domains that RFC 2606 keeps for examples are nobody's."""
    return text != "git"


NAME_IN_CODE = re.compile(r"[A-Za-z]+\d{0,2}(?:_[A-Za-z]+\d{0,2}|_\d{1,2})+")
ISSUED = re.compile(r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}")
_PEM = r"(?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"

_LETTER = rf"[^\W{ALONE}]"
"""A letter of a language that has spaces between words: Chinese and Japanese have an address amid their signs."""


def _ascii(pattern: str) -> re.Pattern[str]:
    """What is looked for is ASCII, and letters of other languages end it: `\\b` is between a Chinese sign and a key."""
    return re.compile(pattern, re.ASCII)


KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool] | None]] = {
    "private key": (_ascii(rf"-----BEGIN {_PEM}(?:[\s\S]{{0,10000}}?-----END {_PEM})?"), None),
    "AWS key": (_ascii(r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"), None),
    "model provider key": (_ascii(r"\bsk-[\w-]{20,}"), _random),  # OpenAI's, Anthropic's and others'
    "GitHub token": (_ascii(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"), None),
    "Google key": (_ascii(r"\bAIza[\w-]{35}"), None),
    "Slack token": (_ascii(r"\bxox[abeoprs]-[\w-]{10,}|\bhooks\.slack\.com/services/[\w/]{20,}"), None),
    "Hugging Face token": (_ascii(r"\bhf_[A-Za-z0-9]{30,}"), None),
    "JSON web token": (_ascii(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), None),
    "secret": (
        _ascii(
            r"(?i:key|secret|token|passw(?:or)?d|pwd|credentials?)\b[\"']?(?:\s*[:=]{1,2}\s*|\s+(?:is|was)\s+)[\"'`]?"
            r"(?P<it>[A-Za-z0-9+/_=-]{16,})"
        ),
        _random,
    ),
    "email": (
        re.compile(
            rf"(?<!{_LETTER})(?<![.+%-])(?P<it>(?:{_LETTER}|[.+%-]){{1,64}})@(?!example\.(?:com|org|net)\b)"
            rf"(?:{_LETTER}|-){{1,63}}(?:\.(?:{_LETTER}|-){{1,63}})*?\.[A-Za-z]{{2,24}}(?!{_LETTER})"
        ),
        _somebody,
    ),
    "IBAN": (_ascii(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    "card number": (_ascii(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])"), _card),
    "IP address": (
        _ascii(r"(?<![\w.:/])(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f]*:[0-9A-Fa-f:]{4,})(?![\w.:])"),
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
