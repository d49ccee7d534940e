"""Advice on the size of a teacher: the law of the capacity gap, at `kdlm init` and `kdlm check`."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_folders import TEXT, tiny_folder

from kdlm import cli
from kdlm.capacity_gap import advice, nearest, parameters, warning
from kdlm.recipe import load

SIZES = st.integers(1_000, 10**12)


@given(st.lists(SIZES, min_size=1, max_size=6), SIZES, SIZES)
def test_advice_is_one_of_the_list_and_never_smaller_for_a_larger_student(teachers, one, other):
    named = {str(number): size for number, size in enumerate(teachers)}
    small, large = (named[nearest(size, named)] for size in sorted((one, other)))
    assert small <= large


def test_the_nearest_to_two_and_a_half_times_is_advised():
    teachers = {"small": 1_000, "right": 2_600, "large": 9_000}
    assert nearest(1_000, teachers) == "right"
    assert advice(1_000, teachers)[1] == "right: 2.6 times the student's size; of these 3 the nearest to 2.5 times"
    assert advice(1_000, {"large": 9_000}) == ["large: 9.0 times the student's size"]


def test_beyond_five_times_there_is_a_warning():
    assert not warning(1_000, {"teacher": 5_000})
    assert "more than 5 times as large" in warning(1_000, {"teacher": 5_001})
    assert not warning(1_000, {"teacher": 5_001, "nearer": 2_000})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, width, layers in (("student", 16, 1), ("near", 32, 1), ("far", 64, 4)):
        tiny_folder(tmp_path / name, width=width, layers=layers)
    (tmp_path / "data.jsonl").write_text(f'{{"text": "{TEXT}"}}\n' * 30)
    return tmp_path


def init(*teachers: str) -> int:
    return cli.main(["init", "--teacher", *teachers, "--student", "./student", "--data", "data.jsonl", "--force"])


def test_init_takes_the_teacher_that_suits_best_of_several(here, capsys):
    assert init("./far", "./near") == 0
    out = capsys.readouterr().out
    assert load("recipe.yaml").teacher.path == "./near"
    assert "of these 2 the nearest to 2.5 times" in out and "more than 5 times" not in out


def test_a_teacher_that_is_too_large_is_said_by_init_and_by_check(here, capsys):
    assert init("./far") == 0
    assert "more than 5 times as large" in capsys.readouterr().out
    assert "# Careful: the teacher is more than 5 times" in Path("recipe.yaml").read_text()
    assert cli.main(["check", "recipe.yaml"]) == 0
    assert "teacher: note: the teacher is more than 5 times as large" in capsys.readouterr().out
    assert init("./near") == 0 and cli.main(["check", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    sizes = [parameters(load("recipe.yaml").teacher.config()), parameters(load("recipe.yaml").student.config())]
    assert f"teacher: {sizes[0] / sizes[1]:.1f} times the student's size" in out and "note" not in out
