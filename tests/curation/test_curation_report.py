"""A pipeline's folder says what became of the rows, and keeps their columns where none is left."""

import json

import pyarrow.parquet
import pytest
from datasets import Dataset

from kdlm.curation import Pipeline, run
from kdlm.curation.report import report


@pytest.fixture
def finish(tmp_path):
    source = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{n} + 1", "completion": f"Answer: {n + n % 2}", "answer": str(n + 1)} for n in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": null, "completion": "x"}\n')

    def finished(*steps):
        plan = {"sources": [{"path": str(source)}], "steps": list(steps), "output": str(tmp_path / "out")}
        run(Pipeline.model_validate(plan), lambda line: None)
        return tmp_path / "out"

    return finished


def test_the_page_counts_rows_in_and_out_by_step_and_by_kind_with_places(finish):
    where = [{"column": "score", "at_least": 1}]
    folder = finish({"name": "verify", "verifier": {"name": "answer"}}, {"name": "filter", "where": where})
    page = (folder / "report.md").read_text()
    assert "| sources |  | 10 |" in page
    assert "| verify | 10 | 10 |" in page
    assert "| filter | 10 | 5 |" in page
    assert "| left out by score | row 0; row 2; row 4 | 5 |" in page
    assert "sums.jsonl:11" in page
    assert f"| 0/1 | {'#' * 40} | 5 |" in page
    assert "| prompt | 9 + 1 |" in page
    about = json.loads((folder / "about.json").read_text())
    assert [step["rows"] for step in about["steps"]] == [10, 10, 5]
    assert len(about["content"]) == 1


def test_the_page_is_the_same_when_nothing_is_left_to_do(finish):
    steps = [{"name": "select", "count": 3}]
    page = (finish(*steps) / "report.md").read_text()
    assert (finish(*steps) / "report.md").read_text() == page


def test_no_rows_left_keep_their_columns_through_every_step_and_on_disk(finish):
    folder = finish(
        {"name": "filter", "where": [{"column": "answer", "one_of": ["none"]}]},
        {"name": "deduplicate"},
        {"name": "select", "count": 2, "of_each": "prompt"},
        {"name": "write", "columns": {"asked": "Say: {prompt}"}},
        {"name": "extract", "into": "final"},
        {"name": "screen", "mark": "flags"},
        {"name": "tokens", "tokenizer": "sandbox:code-student-tiny"},
        {"name": "columns", "rename": {"answer": "reference"}},
    )
    table = pyarrow.parquet.read_table(folder / "rows.parquet")
    assert table.num_rows == 0
    assert {field.name: str(field.type) for field in table.schema} == {
        **dict.fromkeys(["prompt", "completion", "reference", "asked", "final", "flags"], "string"),
        "tokens": "int64",
    }
    assert "`rows.parquet` has 0 rows" in (folder / "report.md").read_text()


def test_long_values_are_cut_and_lines_stay_in_their_cell():
    page = report([], Dataset.from_dict({"text": ["a|b\n" * 200]}))
    assert "(800 characters)" in page
    assert max(map(len, page.splitlines())) < 700
