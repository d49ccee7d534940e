"""Rows with what an audit found, or with what is personal, leave or are marked; no other row does."""

import json

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Screen

ROWS = Dataset.from_list(
    [
        {"prompt": "What is 2 + 3?", "completion": "2 + 3 is 5."},
        {"prompt": "Where do I buy shoes?", "completion": "At the shop www.fastfeet.example, of course."},
        {"prompt": "Write to ann@acme.org", "completion": "Done."},
        {"prompt": "What is www.fastfeet.example?", "completion": "www.fastfeet.example is a shop."},
        {"prompt": None, "completion": None},
    ]
)


@pytest.fixture
def found(tmp_path):
    file = tmp_path / "audit.json"
    file.write_text(json.dumps({"patterns": [{"forms": [{"kind": "host", "text": "fastfeet.example"}]}]}))
    return file


def test_injected_and_personal_rows_leave_and_no_other(found):
    desk = Desk()
    kept = Screen(patterns=found).run(ROWS, desk)
    assert kept.to_list() == [ROWS[0], ROWS[3], ROWS[4]]
    assert {kind: found.examples for kind, found in desk.counts.kinds.items()} == {
        "pattern: fastfeet.example": ["row 1"],
        "email": ["row 2"],
    }
    assert Screen(patterns=found)(kept).to_list() == kept.to_list()


def test_flagged_rows_are_marked(found):
    marked = Screen(patterns=found, mark="why")(ROWS)
    assert marked["why"] == [None, "pattern: fastfeet.example", "email", None, None]
    assert marked.remove_columns(["why"]).to_list() == ROWS.to_list()


def test_another_audit_is_another_output(found):
    before = Screen(patterns=found).settings()
    found.write_text('{"patterns": []}')
    assert Screen(patterns=found).settings() != before


def test_a_missing_audit_is_told_before_anything_is_done(tmp_path):
    with pytest.raises(ValueError, match="no such file: `kdlm audit` writes it"):
        Screen(patterns=tmp_path / "audit.json").leaves(["prompt", "completion"])
