"""`kdlm init`: the loss follows from the tokenizers and the sizes, and the recipe is one that `kdlm check` accepts."""

import json
from pathlib import Path

import pytest
from tiny_folders import TEXT, tiny_folder

from kdlm import cli
from kdlm.recipe import load


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "teacher", width=32)
    tiny_folder(tmp_path / "student")
    write("data.jsonl", {"text": TEXT})
    return tmp_path


def write(path: str, *rows: dict) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows * 30))
    return path


def init(*more: str, teacher: str = "./teacher", data: str = "data.jsonl") -> int:
    return cli.main(["init", "--teacher", teacher, "--student", "./student", "--data", data, *more])


def test_one_tokenizer_gives_forward_kl_with_a_little_cross_entropy(here, capsys):
    assert init() == 0
    recipe = load("recipe.yaml")
    assert recipe.method.name == "logit_kd"
    assert [(loss.name, loss.weight) for loss in recipe.losses] == [("forward_kl", 1.0), ("cross_entropy", 0.1)]
    assert recipe.teacher.path == "./teacher"
    out = capsys.readouterr().out
    assert "the tokenizers share 270 token ids" in out
    assert cli.main(["check", "recipe.yaml"]) == 0


def test_a_wide_gap_gives_taid(here, capsys):
    tiny_folder(here / "teacher", width=64, layers=4)
    assert init() == 0
    assert load("recipe.yaml").method.name == "taid"
    assert cli.main(["check", "recipe.yaml"]) == 0


def test_other_tokenizers_give_sequence_kd_and_say_why(here, capsys):
    tiny_folder(here / "teacher", text="other words make other merges: zzz xxx qqq", width=32)
    assert init() == 0
    recipe = load("recipe.yaml")
    assert (recipe.method.name, recipe.teacher) == ("sequence_kd", None)
    out = capsys.readouterr().out
    assert "losses on logits (forward_kl, taid, ...) cannot work" in out
    assert "what would allow forward_kl or taid: a teacher of the student's family" in out
    assert "# the tokenizers differ" in Path("recipe.yaml").read_text()
    assert cli.main(["check", "recipe.yaml"]) == 0


def test_a_teacher_that_is_smaller_than_its_student_is_doubted(here, capsys):
    assert init(teacher="./student") == 0
    assert "warning: the teacher is not larger than the student" in capsys.readouterr().out


def test_what_the_tokenizers_do_differently_is_a_warning(here, capsys):
    config = here / "teacher" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ messages }}"}))
    assert init() == 0
    assert "warning: the student has no chat template, the teacher has a chat template" in capsys.readouterr().out
    assert "# Careful: the student has no chat template" in Path("recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        ({"text": TEXT}, "text", {}),
        ({"prompt": "a", "completion": "b"}, "completion", {}),
        ({"question": "a", "answer": "b"}, "completion", {"prompt": "question", "completion": "answer"}),
        ({"content": TEXT, "id": 3}, "text", {"text": "content"}),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat", {}),
    ],
)
def test_the_form_of_the_rows_is_seen_in_their_columns(here, capsys, row, form, columns):
    assert init(data=write("rows.jsonl", row)) == 0
    assert f"data: rows.jsonl, {form} rows" in capsys.readouterr().out
    recipe = load("recipe.yaml")
    assert recipe.data.train[0].columns == columns
    assert recipe.data.packing == ("pack" if form == "text" else "none")


def test_a_sandbox_model_is_named_as_such(here):
    assert cli.main(["init", *"--teacher sandbox:code-student-tiny --student ./student --data data.jsonl".split()]) == 0
    recipe = load("recipe.yaml")
    assert recipe.method.name == "sequence_kd"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "./nowhere"}, "./nowhere"),
        ({"teacher": "sandbox:code-techer"}, "the sandbox has no model 'code-techer', did you mean code-teacher?"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_opened_is_named_and_nothing_is_written(here, capsys, change, words):
    before = sorted(here.iterdir())
    assert init(**change) == 2
    assert words in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_columns_that_mean_nothing_are_listed(here, capsys):
    assert init(data=write("rows.jsonl", {"a": 1, "b": 2})) == 2
    assert "'a', 'b'" in capsys.readouterr().err


def test_a_file_that_is_there_is_kept_unless_forced(here, capsys):
    Path("recipe.yaml").write_text("mine")
    assert init() == 2
    assert "--force" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"
    assert init("--force") == 0
    assert load("recipe.yaml").seed == 0


def test_the_recipe_may_go_into_a_new_folder(here):
    assert init("--output", "new/run.yaml") == 0
    assert str(load("new/run.yaml").run_dir) == "runs/run"
