"""The completion's answer and the reference are the same mathematics."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from kdlm.sandbox.tasks import marked_answer
from kdlm.verifiers.verifier import LimitedSection, Verifier


class Math(LimitedSection):
    r"""Equality by the Math-Verify library (github.com/huggingface/Math-Verify): LaTeX and plain expressions, numbers,
    sets, intervals, matrices, equations, compared with SymPy.

    The library looks for the answer itself: the last `\boxed{}` first, then other LaTeX and expressions. The reference
    is LaTeX or an expression, with or without `$` or `\boxed{}` around it. SymPy can compute for ever, so the timeout
    counts: it takes the place of the library's own, which rests on alarms.
    """

    name: Literal["math"] = "math"

    def verifier(self) -> Verifier:
        if find_spec("math_verify") is None:
            raise ValueError("math needs math-verify: pip install 'kdlm[verify]'")
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeout is off
        _expected("1")  # the first takes its grammar apart, which is no completion's fault

        def judge(completion: str, reference: Any, row: Mapping[str, Any]) -> bool:
            if reference is None:
                raise ValueError(f"no reference, expected an expression in the column {self.column!r}")
            expected = _expected(str(reference))
            given = math_verify.parse(completion, parsing_timeout=0)
            return bool(given) and math_verify.verify(expected, given, timeout_seconds=0)

        return judge


@lru_cache(maxsize=1024)
def _expected(reference: str) -> list[Any]:
    """What a reference comes to; the samples of a prompt share it. Raises ValueError when it cannot be read."""
    import math_verify

    answer = marked_answer(reference) or reference.strip().strip("$")
    if not (expected := math_verify.parse(f"${answer}$", parsing_timeout=0)):
        raise ValueError(f"reference {reference[:60]!r} cannot be read as mathematics")
    return expected
