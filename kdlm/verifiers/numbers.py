r"""Numbers in text: found, and read exactly.

Read are signs (also the typographic minus), thousands marks (`1,234`, `1{,}234`, thin spaces), decimals, fractions
(`3/4`, `\frac{3}{4}`, `2 1/2`), powers of ten (`5e3`, `5 \times 10^3`) and per cent; a unit after a number does not
matter. No commas for decimals. Everything is linear in the length of the text, numbers of endless digits among it.
"""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import MAX_EMAX as LARGEST_EXPONENT
from decimal import MIN_EMIN as SMALLEST_EXPONENT
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow

from kdlm.sandbox.tasks import marked_answer

EXACT = Context(
    prec=100, Emax=LARGEST_EXPONENT, Emin=SMALLEST_EXPONENT, traps=[InvalidOperation, DivisionByZero, Overflow]
)
"""Arithmetic of a hundred digits: fractions and differences are rounded there, numbers as written are not."""

_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]{1,200})\}\s?\{([^{}]{1,200})\}")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_NUMBER = re.compile(
    r"""
    (?:(?<![\w)}\]^])(?<![_^]\{)(?P<sign>[-+]))?               # the minus of 10-5 is no sign
    (?:\\?\$|[\u20ac\u00a3\u00a5])?\ ?
    (?<![\w^])(?<![_^][-+{])(?<![_^]\{[-+])(?<![0-9][.,])      # not in a word, an index, a power, nor another number
    (?>
        (?:(?P<whole>[0-9]++)\ (?=[0-9]++/[0-9]))?             # 2 1/2
        (?P<digits>[0-9](?:[0-9,]*[0-9])?(?:\.[0-9]++)?|\.[0-9]++)
        (?:[eE](?P<e>[-+]?[0-9]++)|\ ?(?:\\times|\\cdot|[\u00d7x*])\ ?10\ ?\^\ ?\{?(?P<power>[-+]?[0-9]++)\}?)?
        (?:\ ?/\ ?(?P<under>[0-9]++(?:\.[0-9]++)?))?
        (?P<percent>\ ?\\?%)?
    )
    (?!\ ?\^|\.[0-9])                                          # not 2^10, nor 1.2.3
    """,
    re.VERBOSE,
)
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_NOT_PLAIN = re.compile(r"\\(?:sqrt|pi|infty|log|ln|exp|sin|cos|tan)|[\u221a\u03c0\u221e]")
_LONGEST_EXPONENT = 6  # digits


@dataclass(frozen=True)
class Number:
    """A number as a text gives it: `50%` is 50 with `percent`."""

    value: Decimal
    percent: bool = False


def given_number(text: str) -> Number | None:
    """Return the number that a completion comes to: its marked answer's only one, or else its last one."""
    marked = marked_answer(text)
    if marked is not None:
        return only_number(marked)
    last = deque(_NUMBER.finditer(_plain(text)), maxlen=1)
    return list(_read(last[0]))[-1] if last else None


def only_number(text: str) -> Number | None:
    """Return the one number of a short text, which it may give several times (`3/4 = 0.75`). Where there is a `=`, it
    is what follows that. None where there is none, where there are several (`734 or 735`), and for what is no plain
    number (roots, pi, powers).
    """
    text = re.sub(r"^([-+]) ", r"\1", _plain(text))
    if _NOT_PLAIN.search(text):
        return None
    matches = list(_NUMBER.finditer(text))
    results = [match for match in matches if text.endswith(("=", "= "), 0, match.start())]
    found = {number for match in results or matches for number in _read(match)}
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    text = _FRACTION.sub(r" \1/\2", text.replace("\u2212", "-"))
    return _THOUSANDS.sub(",", re.sub(r"([-+]) (?=[0-9.]+/)", r"\1", text))


def _read(match: re.Match[str]) -> Iterator[Number | None]:
    """The number of a match; several where its commas part numbers (`1,2`) instead of thousands (`1,200`)."""
    digits = match["digits"]
    grouped = "," not in digits or _GROUPED.fullmatch(digits)
    pieces = [digits.replace(",", "")] if grouped else [piece for piece in digits.split(",") if piece]
    for piece in pieces:
        value = _value(piece, match["whole"], match["e"] or match["power"] or "0", match["under"])
        if value is not None and match["sign"] == "-" and piece is pieces[0]:
            value = value.copy_negate()
        yield None if value is None else Number(value, match["percent"] is not None)


def _value(digits: str, whole: str | None, exponent: str, under: str | None) -> Decimal | None:
    if len(exponent.lstrip("+-")) > _LONGEST_EXPONENT:
        return None
    value = Decimal(f"{digits}e{exponent}")
    try:
        value = value if under is None else EXACT.divide(value, Decimal(under))
        return value if whole is None else EXACT.add(Decimal(whole), value)
    except ArithmeticError:  # divided by zero
        return None
