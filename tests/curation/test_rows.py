"""What a pipeline reads from its sources: our columns are ours, and what cannot be kept is counted or named."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdlm.curation import Pipeline, run
from kdlm.curation.prompts import asked_of
from kdlm.curation.rows import read
from kdlm.curation.step import Counts, as_prompt
from kdlm.data.report import Unusable
from kdlm.data.sections import Source

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}


@pytest.fixture
def rows_of(tmp_path: Path):
    def rows_of(*rows: Any, **source: Any) -> tuple[list[Any], Counts]:
        path, counts = tmp_path / "rows.jsonl", Counts()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read([Source(path=str(path), **source)], counts)[0].to_list(), counts

    return rows_of


def test_a_column_of_the_source_does_not_take_the_place_of_what_was_read(rows_of):
    rows, _ = rows_of({"prompt": "another", "question": "2 + 3", "level": 1}, columns={"prompt": "question"})
    assert rows == [{"prompt": "2 + 3", "level": 1}]
    talk = [ASKED, ANSWERED, {"role": "user", "content": "More"}, {"role": "assistant", "content": "No."}]
    rows, _ = rows_of({"prompt": "Hi", "messages": talk})
    assert rows == [{"prompt": json.dumps(talk[:-1]), "completion": "No."}]


def test_an_answer_is_text_and_another_is_counted(rows_of):
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s?"}]}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]}
    picture = {"role": "assistant", "content": [{"type": "image", "url": "x.png"}]}
    rows, counts = rows_of(*({"messages": [ASKED, answer]} for answer in (ANSWERED, parts, calls, picture)))
    assert [row["completion"] for row in rows] == ["Yes?", "Yes?"]
    assert counts.kinds["not read, malformed"].count == 2


def test_half_a_character_is_counted_and_the_other_rows_stay(rows_of):
    rows, counts = rows_of({"prompt": "a"}, {"prompt": "b \ud800"}, {"prompt": "c", "tags": ["\udc00"]})
    assert [row["prompt"] for row in rows] == ["a"]
    assert counts.kinds["not read, malformed"].count == 2


def test_a_number_that_is_too_large_names_its_column(rows_of):
    with pytest.raises(ValueError, match="column 'answer': a number of more than 64 bits: write all of them as text"):
        rows_of({"prompt": "10 ** 30", "answer": 10**30})


def test_empty_objects_are_kept_as_json(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "a", "meta": {}, "calls": [{"name": "f", "given": {}}], "of": {"n": 1}}))
    said = {"sources": [{"path": str(source)}], "output": str(tmp_path / "with a space" / "out")}
    steps = [{"name": "select", "count": 1}]
    rows = run(Pipeline.model_validate({**said, "steps": steps}), lambda line: None).to_list()
    assert rows == [{"prompt": "a", "meta": "{}", "calls": '[{"name": "f", "given": {}}]', "of": {"n": 1}}]


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[{"role": "user"}]', '[{"role": "user", "content": "Hi"', "[{x}] = ?"])
def test_json_that_is_no_conversation_is_text(text):
    assert as_prompt(text) == text
    assert as_prompt(json.dumps([ASKED])) == [ASKED]


def test_a_conversation_gets_no_second_system_message():
    talk = [{"role": "system", "content": "Be short."}, ASKED]
    assert asked_of({"prompt": json.dumps(talk[1:])}, "{prompt}", "Be short.") == talk
    with pytest.raises(Unusable, match="two system messages"):
        asked_of({"prompt": json.dumps(talk)}, "{prompt}", "Be long.")
