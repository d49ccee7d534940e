"""The completion is Python that passes tests, run in a jail."""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kdlm.jail import Isolation, Limits, Test, missing, run
from kdlm.verifiers.verifier import LimitedSection, Verifier

FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
AROUND = 90.0
"""Seconds beyond the program's own that its start and end may take before the worker is given up."""


class Code(LimitedSection):
    """Python code, judged by running it with tests: the last block fenced by ``` in the completion, or all of it where
    there is none. It runs in isolation: docs/generated_code.md says what it cannot do, and on which machines.

    The column holds Python that raises where the code is wrong (`assert f(2) == 4`), a list of such tests, or of calls
    whose results the code never sees (`{call: f(2), result: "4"}`, as `repr` writes it). Where code comes before the
    completion, it holds `{before: code, tests: ...}`.
    """

    name: Literal["code"] = "code"
    column: str = "tests"
    """The column of the data that holds the tests."""
    timeout: float = Field(5.0, gt=0, allow_inf_nan=False)
    """Seconds that a program may take, with all of its tests. What passed until then counts."""
    memory: int = Field(512, ge=64)
    """MiB of address space, of which Python takes 30."""
    score: Literal["all", "share"] = "all"
    """`all`: 1 where every test passes, else 0; `share`: the share of tests that pass."""
    isolation: Isolation = "full"
    """`limits_only` bounds time and memory and lets the code do all that you may do: unsafe, for machines that cannot
    isolate."""

    @property
    def patience(self) -> float:
        return self.timeout + AROUND

    def verifier(self) -> Verifier:
        if self.isolation == "full" and (lacks := missing()):
            raise ValueError(
                f"code: this machine cannot run generated code in isolation, it lacks {' and '.join(lacks)}; "
                "`isolation: limits_only` bounds time and memory alone, and is unsafe"
            )
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> Mapping[str, Any]:
        before, tests = _tests(reference, self.column)
        program = before + (blocks[-1] if (blocks := FENCED.findall(completion)) else completion)
        limits = Limits(seconds=self.timeout, memory=self.memory)
        found = run(program, tests, limits=limits, isolation=self.isolation)
        score = sum(found.passed) / len(tests)
        return {"score": score if self.score == "share" else score == 1, "reason": found.reason}


def _tests(reference: Any, column: str) -> tuple[str, list[Test]]:
    """Return the code before the completion, and the tests. Raises ValueError for what is neither."""
    before, tests = "", reference
    if isinstance(reference, str):
        with contextlib.suppress(ValueError):  # a list or a mapping comes as JSON out of the data of a recipe
            tests = json.loads(reference)
        tests = tests if isinstance(tests, (list, dict)) else reference
    if isinstance(tests, Mapping) and "tests" in tests:
        before, tests = tests.get("before") or "", tests["tests"]
    tests = [tests] if isinstance(tests, (str, Mapping)) else tests
    if not isinstance(tests, (list, tuple)) or not tests or not all(map(_is_test, tests)):
        raise ValueError(
            f"no tests in the column {column!r}: {str(reference)[:60]!r}, expected Python, a list of tests or "
            "{before, tests}; a test is Python or {call, result}"
        )
    return before, list(tests)


def _is_test(test: Any) -> bool:
    if isinstance(test, Mapping):
        return set(test) == {"call", "result"} and all(isinstance(each, str) for each in test.values())
    return isinstance(test, str)
