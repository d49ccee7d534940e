"""What argparse makes of a word: each says what was expected where the word is not that."""

from argparse import ArgumentTypeError
from collections.abc import Callable


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return int(text)

    return parse


def share(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    try:
        if 0 < (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise ArgumentTypeError(f"expected a number above 0, at most 1, got {text!r}")


def rank(text: str) -> int | str:
    """Parse the rank of a matrix, or `full`."""
    return "full" if text == "full" else whole(1, 10**6)(text)


def numbers(text: str) -> list[float]:
    """Parse numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None
