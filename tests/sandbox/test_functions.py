"""The functions to complete: each runs alone as it does at home, and its tests tell right from wrong."""

import textwrap

import pytest

from kdlm.jail import missing, run
from kdlm.sandbox import build
from kdlm.sandbox.function_calls import CALLS, KINDS, draw_calls
from kdlm.sandbox.function_source import source_of
from kdlm.sandbox.functions import Function, functions_of
from kdlm.sandbox.jsonl import read_jsonl


@pytest.fixture(scope="module")
def every() -> list[Function]:
    return [Function(**row) for row in read_jsonl(build("functions") / "eval.jsonl")]


def passed(function: Function, body: str) -> tuple[bool, ...]:
    return run(function.prompt + body, function.tests, isolation="limits_only" if missing() else "full").passed


@pytest.mark.slow
def test_the_real_body_of_every_function_passes_in_the_jail(every):
    assert len(every) >= 80
    assert [each.name for each in every if not all(passed(each, each.body))] == []


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["    return None\n", "    return True\n"])
def test_a_body_of_nothing_passes_for_no_function(every, wrong):
    assert [each.name for each in every if all(passed(each, wrong))] == []


@pytest.mark.slow
def test_the_body_of_another_function_passes_for_few(every):
    others = [*every[1:], every[0]]
    same = [each.name for each, other in zip(every, others, strict=True) if all(passed(each, other.body))]
    assert len(same) <= len(every) // 20, same


@pytest.mark.slow
def test_names_are_unique_and_a_prompt_ends_where_the_body_begins(every):
    assert len({each.name for each in every}) == len(every)
    for each in every:
        assert each.prompt.rstrip().endswith(("'", '"')) and each.prompt.endswith("\n")
        compile(each.prompt + each.body, each.name, "exec")


def test_some_real_bodies_pass_and_the_functions_are_the_same_every_time():
    found = list(functions_of("bisect", CALLS["bisect"], 12, 4_000))
    assert {each.name for each in found} >= {"bisect.bisect_left", "bisect.bisect_right"}
    for each in found:
        assert all(passed(each, each.body)) and not all(passed(each, "    return None\n"))
    assert list(functions_of("bisect", CALLS["bisect"], 12, 4_000)) == found


def test_a_prompt_longer_than_allowed_is_left_out():
    found = list(functions_of("calendar", CALLS["calendar"], 4, 300))
    assert found and all(len(each.prompt) <= 300 for each in found)


def test_calls_are_different_and_the_same_every_time():
    calls = draw_calls("a", "f({words}, {int})", 12)
    assert len(set(calls)) == 12 and calls == draw_calls("a", "f({words}, {int})", 12)
    assert calls != draw_calls("b", "f({words}, {int})", 12)
    assert sorted(draw_calls("a", "f({bool})", 12)) == ["f(False)", "f(True)"]
    assert all(draw_calls(kind, f"f({{{kind}}})", 1) for kind in KINDS)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return the source of a module that is the standard library of this test."""

    def source(text: str):
        source_of.cache_clear()
        (tmp_path / "homemade.py").write_text(textwrap.dedent(text))
        return source_of("homemade")

    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    yield source
    source_of.cache_clear()


def test_what_a_function_needs_stands_above_it_and_nothing_else(module):
    source = module('''
        import os, re
        import sys
        try:
            from _fast import LIMIT
        except ImportError:
            LIMIT = 3
        OTHER = 1
        _table = None
        class Unused: pass
        def unused(): return OTHER
        def helper(x):
            return re.sub("a", "b", x)[:LIMIT]
        @staticmethod
        def wanted(x, OTHER=0):
            """Say it."""
            # begins
            global _table
            _table = _table or sys
            return helper(x)
        ''')
    prompt, body = source.cut("wanted")
    for part in ("import os, re", "import sys", "except ImportError", "_table = None", "def helper", "@staticmethod"):
        assert part in prompt
    assert "nused" not in prompt and "OTHER = 1" not in prompt and prompt.endswith('"""Say it."""\n')
    assert body.startswith("    # begins\n") and body.endswith("return helper(x)\n")


@pytest.mark.parametrize(
    "text",
    [
        "def wanted(x):\n    return x\n",
        'def wanted(x):\n    """Only this."""\n',
        'def wanted(x): """On one line."""; return x\n',
        'from . import part\ndef wanted(x):\n    """Needs its package."""\n    return part.x\n',
        'def wanted(x):\n    """One."""\n    return 1\ndef wanted(x):\n    """Two."""\n    return 2\n',
        'class wanted:\n    """No function."""\n    x = 1\n',
        "",
    ],
)
def test_what_cannot_be_cut_is_left_out(module, text):
    assert module(text).cut("wanted") is None


def test_a_module_that_is_not_there_has_no_functions():
    assert source_of("no_such_module").binds == {}
    assert list(functions_of("no_such_module", ("f({int})",), 4, 1_000)) == []
