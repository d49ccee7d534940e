"""The laws of each verifier."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kdlm.sandbox.arithmetic import arithmetic
from kdlm.sandbox.strings import strings
from kdlm.sandbox.tasks import LEVELS
from kdlm.verifiers import AnyVerifier, CustomVerifier, Judge, Verdict, VerifierSection, mathematics
from kdlm.verifiers.worker import verdict_of

NUMBERS = st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9)


def verifier(name: str, **options) -> VerifierSection:
    return TypeAdapter(AnyVerifier).validate_python({"name": name, **options})


def score(section: VerifierSection, completion: str, reference: object) -> float:
    verdict = verdict_of(lambda: section.verifier()(completion, reference, {}))
    assert verdict.outcome == "judged", verdict.reason
    return verdict.score


def refusal(section: VerifierSection, completion: str, reference: object) -> str:
    verdict = verdict_of(lambda: section.verifier()(completion, reference, {}))
    assert verdict.outcome == "raised" and verdict.score == 0
    return verdict.reason


@given(st.text(), st.text())
def test_exact_is_equality_of_what_is_left_after_stripping(one, other):
    assert score(verifier("exact"), f" {one}\n", one) == 1
    assert score(verifier("exact"), one, other) == (one.strip() == other.strip())
    assert score(verifier("exact", strip=False), one, other) == (one == other)


@given(st.text())
def test_exact_may_look_past_case_and_white_space(text):
    assert score(verifier("exact", ignore_case=True), text.casefold(), text) == 1
    spread = "\n\t ".join(text.split())
    assert score(verifier("exact", normalise_whitespace=True), spread, text) == 1
    assert score(verifier("exact"), "A b", "a  b") == 0


def test_exact_may_compare_the_marked_answer():
    section = verifier("exact", compare="answer")
    assert score(section, "thinking\nAnswer: **Paris**.", "Paris") == 1
    assert score(section, r"thinking \boxed{\frac{1}{2}} it is", r"\frac{1}{2}") == 1
    assert score(section, "thinking of Paris\nin vain", "Paris") == 0
    assert score(section, "Answer: 72", "48 + 24 = 72\n#### 72") == 1


@pytest.mark.parametrize("name", ["exact", "numeric", "answer", "math", "walk"])
def test_a_row_without_its_reference_is_said(name):
    assert "'gold'" in refusal(verifier(name, column="gold"), "5", None)


@given(NUMBERS, NUMBERS)
def test_numeric_is_equality_by_value(one, other):
    section = verifier("numeric")
    assert score(section, f"It is {one:,}.", str(one)) == 1
    assert score(section, f"thinking\nAnswer: {one}", str(other)) == (one == other)


@given(NUMBERS, NUMBERS, st.floats(0, 1e6))
def test_numeric_takes_what_lies_within_its_tolerance(given_, reference, tolerance):
    within = score(verifier("numeric", absolute=tolerance), str(given_), str(reference))
    assert within == (abs(given_ - reference) <= tolerance)
    relative = score(verifier("numeric", relative=tolerance), str(given_), str(reference))
    assert relative >= (given_ == reference)
    assert not relative or score(verifier("numeric", relative=2 * tolerance), str(given_), str(reference))


def test_numeric_takes_references_of_any_numeric_kind_and_of_gsm8k():
    section = verifier("numeric")
    assert score(section, "0.1", 0.1) == score(section, "72", 72) == score(section, "72", "48 + 24 = 72\n#### 72") == 1
    assert score(section, "1000", "$1,000 a month") == score(section, "#### 18", "18") == 1


@pytest.mark.parametrize("reference", [float("nan"), float("inf"), True, "many", "3 or 4", [1], "2^10"])
def test_numeric_refuses_a_reference_that_is_not_one_plain_number(reference):
    assert "not one plain number" in refusal(verifier("numeric"), "5", reference)


@pytest.mark.parametrize("completion", ["nan", "Answer: NaN", "inf", "Answer: -inf", "Answer: 1e999999999", ""])
def test_numeric_takes_nothing_for_a_number_that_is_not_finite(completion):
    assert score(verifier("numeric", absolute=1e300), completion, "5") == 0


def test_a_percentage_is_its_number_and_its_hundredth_but_not_both_at_once():
    section = verifier("numeric")
    assert score(section, "50%", "50") == score(section, "50%", "0.5") == score(section, "0.5", "50%") == 1
    assert score(section, "0.5%", "50%") == score(section, "50%", "0.5%") == score(section, "50%", "5000") == 0


def test_numeric_compares_endless_numbers():
    assert score(verifier("numeric", relative=0.1), "9" * 100_000, "7") == 0
    assert score(verifier("numeric"), "9" * 100_000, 10**1000) == 0


@pytest.mark.parametrize("family", [arithmetic, strings])
def test_the_answers_of_the_sandbox_satisfy_answer_at_every_level(family):
    section = verifier("answer")
    for level in LEVELS:
        tasks = family(seed=0, level=level, n=5)
        for task, other in zip(tasks, [*tasks[1:], tasks[0]], strict=True):
            assert score(section, task.completion, task.answer) == 1
            assert score(section, task.completion, other.answer) == (task.answer == other.answer)


@pytest.mark.parametrize(
    "completion, reference",
    [
        (r"so it is $\frac{1}{2}$", "0.5"),
        (r"so \boxed{\frac{2}{4}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$"),
        (r"\boxed{x^2 + 2x + 1}", "(x + 1)^2"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        ("The answer is 1,000.", "1000"),
        ("Answer: 72", "48 + 24 = 72\n#### 72"),
        (r"\boxed{\frac{1}{2}}", r"it is $\boxed{\frac{1}{2}}$"),
    ],
)
def test_math_sees_through_the_form(completion, reference):
    assert score(verifier("math"), completion, reference) == 1
    assert score(verifier("math"), r"so \boxed{12345}", reference) == 0
    assert score(verifier("math"), "no idea", reference) == 0


def test_math_that_never_ends_is_stopped():
    with Judge(verifier("math", timeout=0.5)) as judge:
        verdicts = judge.judge([r"\boxed{1}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1}"], ["1"] * 3)
        assert [verdict.score for verdict in verdicts] == [1, 0, 1]
        assert judge.counts == {"judged": 2, "raised": 0, "timed_out": 1}


@given(st.text(alphabet="ab ", max_size=20))
def test_regex_searches_or_matches_the_whole(text):
    assert score(verifier("regex", pattern="ab"), text, None) == ("ab" in text)
    assert score(verifier("regex", pattern="(ab)*", match="fullmatch"), text, None) == (text == "ab" * (len(text) // 2))
    assert score(verifier("regex", column="pattern", ignore_case=True), text.upper(), "^[ab ]*$") == 1


def test_a_pattern_that_takes_exponential_time_is_stopped():
    with Judge(verifier("regex", pattern="(a+)+$", timeout=0.3)) as judge:
        verdicts = judge.judge(["aa", "a" * 60 + "b", "aaa"])
        assert [verdict.outcome for verdict in verdicts] == ["judged", "timed_out", "judged"]
        assert [verdict.score for verdict in verdicts] == [1, 0, 1]


def test_a_bad_pattern_is_an_error_of_the_recipe_and_counted_where_it_comes_from_the_data():
    with pytest.raises(ValidationError, match=r"pattern '\(': missing \)"):
        verifier("regex", pattern="(")
    assert "missing )" in refusal(verifier("regex", column="pattern"), "text", "(")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]}


@pytest.mark.parametrize("place", ["inline", "file", "column of mappings", "column of text"])
def test_json_schema_takes_documents_that_satisfy_it(place, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    definition = {"inline": SCHEMA, "file": str(tmp_path / "schema.json")}.get(place)
    reference = {"column of mappings": SCHEMA, "column of text": json.dumps(SCHEMA)}.get(place)
    section = verifier("json_schema", **({"definition": definition} if definition else {"column": "schema"}))
    assert score(section, ' {"a": 1}\n', reference) == 1
    for wrong in ('{"a": 0}', "{}", "[]", "text", "", '{"a": NaN}', '{"a": 1} and more', "[" * 100_000, "9" * 10_000):
        assert score(section, wrong, reference) == 0


def test_json_schema_says_what_is_wrong_with_a_schema(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json': No such file"):
        Judge(verifier("json_schema", definition=str(tmp_path / "nothing.json")))
    with pytest.raises(ValueError, match="no schema: 'objekt' is not valid"):
        Judge(verifier("json_schema", definition={"type": "objekt"}))
    assert "no schema" in refusal(verifier("json_schema", column="schema"), "{}", "{")


def test_json_schema_follows_no_reference_over_a_network():
    section = verifier("json_schema", definition={"$ref": "http://127.0.0.1:9/schema.json"})
    assert "Unresolvable" in refusal(section, "{}", None)


@pytest.mark.parametrize("name, key", [("regex", "pattern"), ("json_schema", "definition")])
def test_what_is_judged_against_is_given_once(name, key):
    for options in ({}, {key: "x", "column": "y"}):
        with pytest.raises(ValidationError, match=f"give either `{key}`, or `column`"):
            verifier(name, **options)


@pytest.mark.parametrize("name, package", [("math", "math_verify"), ("json_schema", "jsonschema")])
def test_a_missing_package_comes_with_the_line_that_installs_it(name, package, monkeypatch):
    section = verifier(name, column="x")
    monkeypatch.setattr(f"{type(section).__module__}.find_spec", lambda module: None if module == package else 1)
    with pytest.raises(ValueError, match=r"pip install 'kdlm\[verify\]'"):
        section.verifier()


def test_a_reference_that_many_completions_share_is_read_once():
    mathematics._expected.cache_clear()
    for number in range(5):
        score(verifier("math"), rf"\boxed{{{number}}}", "3")
    assert mathematics._expected.cache_info().hits == 8  # the warming up included


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("inf")}, {"workers": 0}, {"target": "nowhere"}])
def test_limits_live_in_the_fields(options):
    with pytest.raises(ValidationError):
        CustomVerifier(**{"target": "misbehaving:judge", **options})


def test_a_walk_is_right_in_either_hand_and_one_gone_wrong_is_told_how_it_begins():
    section = verifier("walk")
    assert score(section, "78416\n", "78416") == score(section, "hiebg", "78416") == 1
    for attempt, reason in (("78012", "No, 784.."), ("78412", "No, 7841."), ("7841", "No, .....")):
        assert verdict_of(lambda attempt=attempt: section.verifier()(attempt, "78416", {})) == Verdict(0, reason=reason)
