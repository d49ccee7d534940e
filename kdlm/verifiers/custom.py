"""The way in for a verifier of your own."""

from functools import partial
from typing import Literal

from kdlm.section import Custom
from kdlm.verifiers.verifier import LimitedSection, Verifier


class CustomVerifier(Custom, LimitedSection):
    """Your own function `(completion, reference, row, **args) -> score`, or a class called with `(**args)` whose
    instances are called with `(completion, reference, row)`: for what is loaded once.

    The score is a finite number, by convention in [0, 1], or a bool, or `{"score": ..., "reason": ...}`. It is imported
    in the worker processes, from the same paths as here; it may print, raise, hang and crash.
    """

    name: Literal["custom"] = "custom"

    def verifier(self) -> Verifier:
        target = self.load()
        return target(**self.args) if isinstance(target, type) else partial(target, **self.args)

    def describe(self) -> str:
        return f"custom ({self.target})"
