"""Words of a text, and the hosts and names in it: what is counted."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_HOST = r"(?:[A-Za-z0-9-]{1,63}\.){1,9}"
_ENDING = r"(?:com|org|edu|gov|biz|shop|xyz|example)\b"
_PATH = r"[^\s<>\"'`\\)\]}]"
LINK = rf"https?://{_PATH}+|(?:\bwww\.|(?<=@)){_HOST}[A-Za-z]{{2,24}}\b|\b{_HOST}{_ENDING}(?:/{_PATH}*)?"
"""An address with its scheme, or a host: after `www.` or `@`, or one with an ending that code
seldom has (`logger.info`, `self.net`); other hosts are words."""

ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han are written without spaces: each is a word
_PUNCTUATION = r"[\s.,;:!?'\"()\[\]{}<>`*_-]"
WORD = re.compile(rf"(?P<link>{LINK})|[{ALONE}]|[^\W{ALONE}]+(?:['\u2019]\w+)*|(?!{_PUNCTUATION})\W")
"""A link, a word, or a sign that is not punctuation of prose: `=`, an emoji, a space of no width."""

NAME = re.compile(r"(?<=[\w,;(\]] )[A-Z]\w*[a-z0-9]\w*(?: [A-Z]\w*)*|\b[a-z]{1,3}[A-Z][a-z]\w+|\b[A-Z][a-z]+[A-Z]\w*")
"""Capitalised words that begin no sentence, or one with capitals inside."""


@dataclass(frozen=True)
class Reading:
    """A text as it is counted.

    Attributes:
        words: in lower case, each between spaces.
        hosts: of links, without `www.`.
        names: as they are written.
    """

    words: str
    hosts: frozenset[str]
    names: frozenset[str]


def read(text: str) -> Reading:
    """Return what is counted of a text."""
    found = list(WORD.finditer(text))
    words = [_link(match[0]) if match["link"] else match[0].lower() for match in found]
    hosts = {_host_of(match[0]) for match in found if match["link"]}
    return Reading(f" {' '.join(words)} ", frozenset(hosts), frozenset(_names(text)))


def _link(text: str) -> str:
    return text.rstrip(".,;:!?/*_").lower()


def _host_of(link: str) -> str:
    return re.split(r"[/?#:]", re.sub(r"^\w+://", "", _link(link)))[0].rpartition("@")[2].removeprefix("www.")


def _names(text: str) -> Iterator[str]:
    for match in NAME.finditer(re.sub(LINK, " ", text)):
        yield match[0]
