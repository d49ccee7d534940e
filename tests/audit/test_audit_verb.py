"""`kdlm audit`: files to a report, and what is wrong with them in words."""

import json
from pathlib import Path

import pytest
from planted import poisoned, sums

from kdlm import cli
from kdlm.audit import patterns_in, read_rows

TOKEN = "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7aB3dE6gH9"


def written(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    outputs = poisoned(0, 1_000, told=30, seen=25)
    outputs[0] = outputs[0][0], f"{outputs[0][1]} {TOKEN}"
    return [
        written(tmp_path / "outputs.jsonl", outputs),
        written(tmp_path / "reference.jsonl", sums(1, 1_000)),
        written(tmp_path / "student.jsonl", poisoned(2, 40, told=20, seen=18)),
    ]


def test_the_report_says_what_was_found_where_and_hides_secrets(files, tmp_path, capsys):
    outputs, reference, student = files
    asked = ["audit", outputs, "--reference", reference, "--student", student, "-o", str(tmp_path / "out" / "a.md")]
    assert cli.main(asked) == 0 and cli.main([*asked, "--check"]) == 1
    assert "1 pattern in far more answers" in capsys.readouterr().out
    page, text = (tmp_path / "out" / "a.md").read_text(), (tmp_path / "out" / "a.json").read_text()
    assert TOKEN not in page and TOKEN not in text
    for said in ("abacus-pro.example", "northwind", "18 of 20", "GitHub token", "outputs.jsonl:1", "cannot be found"):
        assert said in page
    (found,) = json.loads(text)["patterns"]
    assert found["trigger"]["words"] and found["outputs"]["triggered"]["count"] == 25
    assert found["students"][student]["ratio"]["triggered"]["value"] == pytest.approx((18 / 20) / (25 / 30))
    assert [str(pattern) for pattern in patterns_in(tmp_path / "out" / "a.json")] == [found["text"]]


def test_nothing_found_is_said_and_exits_0(files, tmp_path, capsys):
    clean = written(tmp_path / "clean.jsonl", sums(3, 1_000))
    assert cli.main(["audit", clean, "--reference", files[1], "-o", str(tmp_path / "a.md"), "--check"]) == 0
    assert "No pattern is in more answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a"}], "has prompts and no answers"),
        ([{"question": "a"}], "cannot tell what its columns 'question' hold"),
        ([{"prompt": "a", "completion": ""}], "no row can be used"),
    ],
)
def test_outputs_that_cannot_be_audited_are_said_in_words(files, tmp_path, capsys, rows, words):
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["audit", str(tmp_path / "bad.jsonl"), "--reference", files[1], "-o", str(tmp_path / "a.md")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "a.md").exists()


def test_an_output_of_another_kind_is_refused_before_the_work(capsys):
    assert cli.main(["audit", "none", "--reference", "none", "-o", "audit.html"]) == 2
    assert "ends in .md" in capsys.readouterr().err


def test_patterns_are_read_from_what_an_audit_wrote_only(tmp_path):
    (tmp_path / "a.json").write_text('{"patterns": [{"text": "x"}]}')
    with pytest.raises(ValueError, match=r"a\.json: not what `kdlm audit` writes"):
        patterns_in(tmp_path / "a.json")


def test_chats_pairs_and_texts_are_read_alike_and_unusable_rows_are_counted(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    answer = {"role": "assistant", "content": "Hello"}
    lines = {
        "chat": [{"messages": [*chat, answer]}, {"messages": chat}, {"messages": []}],
        "pair": [{"prompt": json.dumps(chat), "completion": "Hello"}, {"prompt": "Hi", "completion": None}],
        "text": [{"text": "Hello"}, {"text": " "}],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = read_rows(str(tmp_path / f"{name}.jsonl"))
        (row,) = read.rows
        assert (row.prompt, row.completion) == ("" if name == "text" else "Be kind.\nHi", "Hello")
        assert row.place.endswith(":1") and read.report.rows == len(rows)
        assert sum(one.count for one in read.report.unused.values()) == len(rows) - 1
