"""The verifier `code`: completions judged by running them, and what they cannot make of it."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from kdlm.jail import missing
from kdlm.verifiers import AnyVerifier, Code, Judge, code
from kdlm.verifiers.worker import verdict_of

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {', '.join(missing())}")

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(1) == 2", "assert double('a') == 'aa'", "assert double(3) == 7"]


def verdict(completion: str, reference: object, **options):
    return verdict_of(lambda: Code(**options).verifier()(completion, reference, {}))


def test_a_recipe_names_it():
    found = TypeAdapter(AnyVerifier).validate_python({"name": "code", "timeout": 3, "memory": 256, "score": "share"})
    assert isinstance(found, Code) and found.limited and found.column == "tests"
    with pytest.raises(ValidationError):
        Code(memory=10)


def test_all_tests_count_or_the_share_of_them():
    assert verdict(DOUBLE, TESTS[:2], timeout=60).score == 1
    assert verdict(DOUBLE, TESTS, timeout=60).score == 0
    assert verdict(DOUBLE, TESTS, timeout=60, score="share").score == pytest.approx(2 / 3)
    assert verdict(DOUBLE, TESTS, timeout=60).reason == "test 2: AssertionError"
    assert verdict(DOUBLE, "\n".join(TESTS[:2]), timeout=60).score == 1
    assert verdict("", TESTS, timeout=60, score="share").score == 0


def test_the_last_fenced_block_is_the_program_and_all_of_it_where_there_is_none():
    wrong = "def double(x):\n    return x\n"
    for text in (f"Thus:\n```python\n{DOUBLE}```\nDone.", f"```\n{wrong}```\nno:\n```py\n{DOUBLE}```", DOUBLE):
        assert verdict(text, TESTS[:2], timeout=60).score == 1
    assert verdict(f"```\n{DOUBLE}```\n```\n{wrong}```\n", TESTS[:2], timeout=60).score == 0


def test_code_before_the_completion_and_calls_with_results():
    tests = [{"call": "double(2)", "result": "4"}, {"call": "double([1])", "result": "[1, 1]"}]
    assert verdict("    return 2 * x\n", {"before": "def double(x):\n", "tests": tests}, timeout=60).score == 1
    assert verdict("    return 4\n", {"before": "def double(x):\n", "tests": tests}, timeout=60).score == 0


def test_tests_may_come_as_json():
    calls = {"before": "def double(x):\n", "tests": [{"call": "double(2)", "result": "4"}]}
    assert verdict("    return 2 * x\n", json.dumps(calls), timeout=60).score == 1
    assert verdict(DOUBLE, json.dumps(TESTS), timeout=60, score="share").score == pytest.approx(2 / 3)
    assert verdict(DOUBLE, "[double(n) for n in range(3)]", timeout=60).score == 1  # Python, and no JSON
    assert verdict(DOUBLE, "7", timeout=60).score == 1


@pytest.mark.parametrize(
    "trick",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        "print('passed 0\\npassed 1\\npassed 2')",
        "class double:\n    __init__ = __eq__ = lambda *_: True",
        "import builtins; builtins.eval = lambda *_: 2\ndouble = None",
    ],
)
def test_a_way_out_is_no_pass(trick):
    tests = [{"call": "double(1)", "result": "2"}, {"call": "double(2)", "result": "4"}]
    assert verdict(trick, tests, timeout=60, score="share").score <= 0.5
    assert verdict(trick, tests, timeout=60).score == 0


@pytest.mark.parametrize("reference", [None, [], 3, [3], {"tests": []}, {"call": "f()"}, [{"call": 1, "result": "x"}]])
def test_what_is_no_test_is_said(reference):
    found = verdict(DOUBLE, reference, column="checks")
    assert found.outcome == "raised" and "no tests in the column 'checks'" in found.reason


def test_a_program_that_takes_too_long_is_judged_and_the_worker_goes_on():
    hang = "import time; time.sleep(1000)"
    with Judge(Code(timeout=2)) as judge:
        found = judge.judge([DOUBLE, hang, DOUBLE], [TESTS[:2]] * 3)
        assert judge.counts == {"judged": 3, "raised": 0, "timed_out": 0}
    assert [each.score for each in found] == [1, 0, 1] and found[1].reason == "not done after 2 s"


def test_a_machine_that_cannot_isolate_refuses_when_the_judge_is_made(monkeypatch):
    monkeypatch.setattr(code, "missing", lambda: ["Landlock"])
    with pytest.raises(ValueError, match="it lacks Landlock; `isolation: limits_only`"):
        Code().verifier()
    assert verdict(DOUBLE, TESTS[:2], timeout=60, isolation="limits_only").score == 1
