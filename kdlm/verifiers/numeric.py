"""The number that a completion comes to is the reference."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field

from kdlm.sandbox.tasks import marked_answer
from kdlm.verifiers.numbers import EXACT, Number, given_number, only_number
from kdlm.verifiers.verifier import Verifier, VerifierSection


class Numeric(VerifierSection):
    r"""The final number equals the reference: the one that follows the last `Answer:` or `####` (GSM8K, arXiv
    2110.14168), or stands in the last `\boxed{}`; without any of them, the last number of the completion.

    A marked answer of several numbers (`734 or 735`) is wrong. Units are not compared. `50%` is 0.5, and is 50 too;
    `numbers.py` says what is read. The reference is a number, or text that comes to one.
    """

    name: Literal["numeric"] = "numeric"
    absolute: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Largest difference that counts as equal."""
    relative: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Largest difference that counts as equal, as a part of the reference. The larger of both tolerances holds."""

    def verifier(self) -> Verifier:
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> bool:
        expected = self._expected(reference)
        given = given_number(completion)
        if given is None:
            return False
        if given.percent == expected.percent:
            return self._close(given.value, expected.value)
        # only one of them has a percent sign, which may be a unit or a hundredth
        part, whole = (given, expected) if given.percent else (expected, given)
        factors = (Decimal(1), Decimal("0.01"))
        pairs = [(EXACT.multiply(part.value, factor), whole.value) for factor in factors]
        return any(self._close(*(pair if given.percent else pair[::-1])) for pair in pairs)

    def _close(self, given: Decimal, expected: Decimal) -> bool:
        if given == expected:
            return True
        tolerance = max(Decimal(self.absolute), EXACT.multiply(Decimal(self.relative), expected.copy_abs()))
        return EXACT.subtract(given, expected).copy_abs() <= tolerance

    def _expected(self, reference: Any) -> Number:
        number = None
        if isinstance(reference, str):
            number = only_number(reference) if (marked := marked_answer(reference)) is None else only_number(marked)
        elif isinstance(reference, int | float | Decimal) and not isinstance(reference, bool):
            value = Decimal(repr(reference)) if isinstance(reference, float) else Decimal(reference)
            number = Number(value) if value.is_finite() else None
        if number is None:
            shown = f"{reference[:60]!r}" if isinstance(reference, str) else type(reference).__name__
            raise ValueError(f"reference {shown} is not one plain number, expected one in the column {self.column!r}")
        return number
