"""Columns are written, extracted, renamed, dropped and counted; a row that lacks what is needed leaves, named."""

import json

import pytest
from datasets import Dataset
from pydantic import ValidationError

from kdlm.curation import Columns, Desk, Extract, Tokens, Write

ROWS = Dataset.from_list(
    [
        {"prompt": "2 + 3", "thoughts": "three more", "answer": "5"},
        {"prompt": "2 + 4", "thoughts": None, "answer": "6"},
        {"prompt": "2 + 5", "thoughts": "", "answer": "7"},
    ]
)
THINKS = r"<think>(?P<thoughts>.*?)</think>\s*(?P<final>.*)"


def completions(*texts: str | None) -> Dataset:
    return Dataset.from_dict({"completion": list(texts), "number": list(range(len(texts)))})


def test_templates_read_the_columns_that_the_rows_came_with():
    desk = Desk()
    step = Write(columns={"prompt": "[label] {prompt}", "completion": "{thoughts}: {prompt} is \\boxed{{answer}}"})
    (row,) = step.run(ROWS, desk).to_list()
    assert row["prompt"] == "[label] 2 + 3"
    assert row["completion"] == "three more: 2 + 3 is \\boxed{5}"
    assert row["answer"] == "5"
    assert desk.counts.kinds["no thoughts"].examples == ["row 1", "row 2"]


def test_a_conversation_stays_one():
    turns = [{"role": "system", "content": "Sums."}, {"role": "user", "content": "2 + {x}"}]
    rows = Dataset.from_list([{"prompt": json.dumps(turns)}])
    (row,) = Write(columns={"prompt": "Think: {prompt}", "asked": "{prompt}"})(rows).to_list()
    assert json.loads(row["prompt"]) == [turns[0], {"role": "user", "content": "Think: 2 + {x}"}]
    assert row["asked"] == "2 + {x}"


def test_a_template_of_a_column_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"write: columns\.completion: \{rationale\} is no column"):
        Write(columns={"completion": "{rationale}"})(ROWS)


def test_named_groups_are_columns():
    desk = Desk()
    rows = Extract(pattern=THINKS).run(
        completions("<think>1\n2</think>\n3", "no thoughts", None, "<think>a</think>b"), desk
    )
    assert (rows["thoughts"], rows["final"], rows["number"]) == (["1\n2", "a"], ["3", "b"], [0, 3])
    assert desk.counts.kinds["not found in completion"].examples == ["row 1", "row 2"]


def test_the_first_or_the_last_match_is_taken():
    rows = completions("1 then 22 then 333")
    assert Extract(pattern=r"\d+", into="found")(rows)["found"] == ["1"]
    assert Extract(pattern=r"\d+", into="found", which="last")(rows)["found"] == ["333"]


def test_without_a_pattern_it_is_the_final_answer():
    rows = Extract(into="answer")(completions("so \\boxed{\\frac{1}{2}}", "Answer: 4\nAnswer: 5", "none", "#### 7"))
    assert rows["answer"] == ["\\frac{1}{2}", "5", "7"]


@pytest.mark.parametrize(
    "asked", [{}, {"pattern": "(?P<a>x)", "into": "b"}, {"pattern": "x"}, {"pattern": "(", "into": "b"}]
)
def test_an_extraction_that_goes_nowhere_is_refused(asked):
    with pytest.raises(ValidationError, match=r"into|no regular expression"):
        Extract(**asked)


def test_what_is_written_is_extracted_again():
    rows = Write(columns={"completion": "<think>{thoughts}</think>\n{answer}"})(ROWS)
    assert Extract(pattern=THINKS)(rows)["final"] == rows["answer"]


def test_columns_are_renamed_and_dropped_in_their_order():
    rows = Columns(rename={"thoughts": "answer"}, drop=["answer"])(ROWS)
    assert rows.column_names == ["prompt", "answer"]
    assert rows["answer"] == ROWS["thoughts"]


@pytest.mark.parametrize(
    ("asked", "fault"), [({"rename": {"thoughts": "answer"}}, "there already"), ({"drop": ["x"]}, "no column 'x'")]
)
def test_columns_that_clash_or_are_missing_are_named(asked, fault):
    with pytest.raises(ValueError, match=fault):
        Columns(**asked)(ROWS)


def test_tokens_are_counted_and_no_text_has_none():
    rows = Tokens(tokenizer="sandbox:code-student-tiny")(completions("a = 1", "a = 1" * 10, None, ""))
    first, second, *none = rows["tokens"]
    assert 0 < first < second <= 50
    assert none == [None, None]


@pytest.mark.parametrize(
    "step", [Write(columns={"new": "{prompt}"}), Extract(column="prompt", into="new"), Columns(drop=["answer"])]
)
def test_of_no_rows_the_columns_stay(step):
    none = step(ROWS.select([]))
    assert len(none) == 0
    assert none.features["prompt"] == ROWS.features["prompt"]
    assert ("new" in none.column_names) == (not isinstance(step, Columns))


def test_what_is_no_text_has_nothing_to_extract():
    desk = Desk()
    rows = Extract(into="answer", column="c").run(Dataset.from_dict({"c": [["Answer: 3"]]}), desk)
    assert len(rows) == 0 and desk.counts.kinds["not found in c"].count == 1
