"""`kdlm init`: the loss follows from the tokenizers and the sizes, and the recipe is one that `kdlm check` accepts."""

import json
from pathlib import Path

import pytest
from tiny_folders import TEXT, sandbox_folder, tiny_folder

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


def test_tokenizers_with_many_tokens_in_common_compare_those(here, capsys):
    tiny_folder(here / "teacher", vocab=305, width=32)
    tiny_folder(here / "student", vocab=290)
    assert init() == 0
    recipe = load("recipe.yaml")
    assert recipe.method.name == "shared_vocabulary_kd"
    assert [loss.name for loss in recipe.losses] == ["forward_kl", "cross_entropy"]
    assert "290 tokens spell the same bytes, of the student's 290 and the teacher's 305" in capsys.readouterr().out
    assert "# the tokenizers differ" in Path("recipe.yaml").read_text()
    assert cli.main(["check", "recipe.yaml"]) == 0


@pytest.mark.parametrize(
    ("kind", "method", "said"),
    [
        ("4k", "logit_kd", "the tokenizers share 4096 token ids"),
        ("bytes", "byte_kd", "method: byte_kd, because the student reads bytes"),
        ("spbpe-1k", "alm", "method: alm, which compares how likely both find each piece of text"),
        ("unigram-1k", "alm", "tokens spell the same bytes, of the student's 1024 and the teacher's 4096"),
        ("wordpiece-1k", "alm", "Careful: the student's tokenizer changes text before it reads it"),
    ],
)
def test_a_method_is_found_for_every_kind_of_tokenizer(here, kind, method, said):
    teacher = sandbox_folder(here / "teacher", "4k")
    student = sandbox_folder(here / "student", kind)
    assert cli.main(["init", "--teacher", teacher, "--student", student, "--data", "data.jsonl"]) == 0
    recipe = load("recipe.yaml")
    assert recipe.method.name == method
    assert recipe.teacher is not None
    assert said in Path("recipe.yaml").read_text()
    assert cli.main(["check", "recipe.yaml"]) == 0


def test_two_tokenizers_that_change_text_leave_the_teachers_text(here):
    student, teacher = (sandbox_folder(here / name, f"{name}-1k") for name in ("wordpiece", "nfkc"))
    assert cli.main(["init", "--teacher", teacher, "--student", student, "--data", "data.jsonl"]) == 0
    recipe = load("recipe.yaml")
    assert (recipe.method.name, recipe.teacher) == ("sequence_kd", None)
    assert "both change text before they read it" in Path("recipe.yaml").read_text()


def test_chat_across_tokenizers_wants_a_template_of_the_teacher(here, capsys):
    tiny_folder(here / "teacher", text="other words make other merges: zzz xxx qqq", width=32)
    rows = write("rows.jsonl", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert init(data=rows) == 0
    assert "the teacher's tokenizer has no chat template: set data.teacher_chat_template" in capsys.readouterr().out


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
    assert cli.main(["init", *"--teacher sandbox:code-teacher-tiny --student ./student --data data.jsonl".split()]) == 0
    recipe = load("recipe.yaml")
    assert (recipe.method.name, recipe.teacher.model) == ("alm", "code-teacher-tiny")


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
