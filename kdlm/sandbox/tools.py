"""A small world of tools: a calculator and a key-value store, asked one call a turn.

| call | reply |
|---|---|
| `calc: 12 * (3 + 4)` | the number; whole numbers, `+`, `-`, `*`, parentheses |
| `set a 84` | `ok` |
| `get a` | the number |
| `answer: 84` | `right` or what is wrong; the episode is over |

Anything else, and a call that cannot be done, gets a line that begins with `error:` and says why. Nothing is ever
evaluated by Python.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LONGEST = 80
"""Characters of an expression."""
LARGEST = 10**12
"""Numbers that are larger are refused."""
USAGE = "use calc: EXPRESSION, set KEY NUMBER, get KEY or answer: NUMBER"

_NUMBER = re.compile(r"-?[0-9]{1,12}", re.ASCII)
_KEY = re.compile(r"[a-z]{1,12}", re.ASCII)
_TOKEN = re.compile(r" *([0-9]{1,13}|[-+*()])", re.ASCII)


@dataclass(frozen=True)
class Said:
    """What the world says to a call: text, whether the episode is over, and whether it was solved."""

    text: str
    done: bool = False
    right: bool = False


@dataclass
class World:
    """One episode's tools.

    Attributes:
        answer: the number that is asked for.
        goal: what the store must hold at the end, beside anything else.
        store: what it holds now.
    """

    answer: int
    goal: Mapping[str, int] = field(default_factory=dict)
    store: dict[str, int] = field(default_factory=dict)

    def call(self, text: str) -> Said:
        """Do what a turn asks for. It never raises: what cannot be done is said."""
        line = text.strip()
        if "\n" in line:
            return Said("error: one call a turn")
        name, _, rest = line.partition(":" if re.match(r"(calc|answer) *:", line) else " ")
        name = name.strip()
        known = {"calc": self._calc, "answer": self._answer} if ":" in line else {"set": self._set, "get": self._get}
        if name not in known:
            return Said(f"error: unknown command; {USAGE}" if line else f"error: nothing was called; {USAGE}")
        try:
            return known[name](rest.strip())
        except ValueError as error:
            return Said(f"error: {error}")

    def _calc(self, expression: str) -> Said:
        return Said(str(value_of(expression)))

    def _answer(self, value: str) -> Said:
        number = _number(value)
        missing = [key for key, wanted in self.goal.items() if self.store.get(key) != wanted]
        if number != self.answer:
            return Said("wrong: it is another number", done=True)
        if missing:
            return Said(f"wrong: {missing[0]} is not stored as asked", done=True)
        return Said("right", done=True, right=True)

    def _set(self, rest: str) -> Said:
        key, _, value = rest.partition(" ")
        self.store[_key(key)] = _number(value.strip())
        return Said("ok")

    def _get(self, rest: str) -> Said:
        key = _key(rest)
        if key not in self.store:
            held = ", ".join(sorted(self.store)) or "nothing"
            raise ValueError(f"no {key} in the store, it holds {held}")
        return Said(str(self.store[key]))


def value_of(expression: str) -> int:
    """Return the value of whole numbers with `+`, `-`, `*`, parentheses and signs.

    Raises ValueError, with words for the student, for anything else, and where a number passes LARGEST.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression is longer than {LONGEST} characters")
    tokens, at = [], 0
    while at < len(expression):
        found = _TOKEN.match(expression, at)
        if found is None:
            raise ValueError("the expression has something else than whole numbers, + - * and parentheses")
        tokens.append(found[1])
        at = found.end()
    return _Reader([*tokens, ""]).whole()


@dataclass
class _Reader:
    """Reads tokens from left to right; "" ends them. Its depth is bounded by the length of an expression."""

    tokens: list[str]
    at: int = 0

    def whole(self) -> int:
        value = self._sum()
        if self._next():
            raise ValueError(f"the expression has a {self._next()} too many")
        return value

    def _next(self) -> str:
        return self.tokens[self.at]

    def _take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def _sum(self) -> int:
        value = self._product()
        while self._next() in ("+", "-"):
            value = _bounded(value + self._product() if self._take() == "+" else value - self._product())
        return value

    def _product(self) -> int:
        value = self._factor()
        while self._next() == "*":
            self._take()
            value = _bounded(value * self._factor())
        return value

    def _factor(self) -> int:
        token = self._take() if self._next() else ""
        if token.isdigit():
            return _bounded(int(token))
        if token in ("+", "-"):
            return self._factor() if token == "+" else -self._factor()
        if token == "(":
            value = self._sum()
            if self._next() != ")":
                raise ValueError("the expression has a parenthesis that does not close")
            self._take()
            return value
        raise ValueError(
            "the expression lacks a number" if token == "" else f"the expression lacks a number at {token}"
        )


def _bounded(value: int) -> int:
    if abs(value) > LARGEST:
        raise ValueError("the number is too large")
    return value


def _number(text: str) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise ValueError("expected a whole number")
    return int(text)


def _key(text: str) -> str:
    if _KEY.fullmatch(text) is None:
        raise ValueError("expected a key of small letters")
    return text
