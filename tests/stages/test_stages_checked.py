"""`kdlm check` and `kdlm plan` of a file of stages: all of them, before the first has run."""

import json
from pathlib import Path
from typing import Any

import pytest
from four_stages import HIDDEN, NAMES, TEACHER, left_by, recipe, staged, write

from kdlm import cli
from kdlm.sandbox import build
from kdlm.stages import check, load


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    build("code-student-tiny")
    build("code-teacher-tiny")
    return staged(tmp_path / "run")


def checked(tmp_path: Path, content: dict[str, Any], *changes: str) -> list[str]:
    return check(load(write(tmp_path / "stages.yaml", content), changes))


def refused(tmp_path: Path, content: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        checked(tmp_path, content)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_every_stage_is_looked_at_before_there_is_anything_of_the_earlier_ones(tmp_path, content) -> None:
    lines = checked(tmp_path, content)
    assert {line.split(": ")[0] for line in lines} == {f"stage {name}" for name in NAMES}
    assert "stage task: student: stage:adapted" in lines
    assert "stage task: tokenizers: 512 ids shared, identical" in lines
    assert "stage enhanced: carry: projectors of stage general" in lines
    assert not any("note: " in line or "not looked at" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_a_later_stages_teacher_with_other_tokens_is_found_before_the_first_stage_runs(tmp_path, content) -> None:
    build("code-student-tiny-bytes")
    content["stages"][3]["recipe"]["teacher"] = {"name": "sandbox", "model": "code-student-tiny-bytes"}
    text = write(tmp_path / "stages.yaml", content).read_text().splitlines()
    said = refused(tmp_path, content)
    line = next(number for number, line in enumerate(text, 1) if "tiny-bytes" in line) - 2
    assert said.startswith(f"stage task: stages.yaml:{line}: teacher: ")
    assert cli.main(["train", str(tmp_path / "stages.yaml")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_stage_of_whose_student_nothing_is_made_is_noted(tmp_path, content) -> None:
    content["stages"][3]["recipe"]["student"]["path"] = "stage:enhanced"
    notes = [line for line in checked(tmp_path, content) if "note: " in line]
    assert notes == ["stage adapted: note: no later stage takes its student (stage:adapted)"]


def test_what_is_carried_must_be_trained_by_both_methods_and_the_error_has_its_line(tmp_path, content) -> None:
    content["stages"][2]["carry"] = ["projectors"]
    text = write(tmp_path / "stages.yaml", content).read_text().splitlines()
    lines = [number for number, line in enumerate(text, 1) if "carry:" in line]
    assert refused(tmp_path, content) == (
        f"stage adapted: stages.yaml:{lines[1]}: carry: taid of stage adapted has no 'projectors': it trains no "
        "network beside the student"
    )
    content["stages"][2]["carry"] = []
    content["stages"][0]["carry"] = ["projectors"]
    assert "carry: the student comes from no earlier stage" in refused(tmp_path, content)


def test_a_skipped_stage_is_said_and_what_would_have_gone_on_begins_anew(tmp_path, content) -> None:
    lines = checked(tmp_path, content, "general.skip=true")
    assert "stage general: skipped" in lines
    assert any(line.startswith("stage enhanced: note: carry: ") and line.endswith("anew") for line in lines)


def test_a_stage_of_a_model_that_is_not_here_yet_holds_up_only_those_that_take_it(tmp_path, content) -> None:
    content["stages"][0]["recipe"]["student"] = {"name": "pretrained", "path": "nobody/no-such-model"}
    lines = checked(tmp_path, content)
    assert [line.split(": ")[1] for line in lines if "nobody/no-such-model: cannot open" in line][:2]
    waiting = [line.split(": ")[0] for line in lines if ": not looked at here (stage:" in line]
    assert waiting == ["stage enhanced", "stage adapted", "stage task"]


def test_the_plan_tells_the_stage_that_needs_the_most(tmp_path, content, capsys) -> None:
    content["stages"] = [
        {"name": "small", "recipe": recipe(dict(TEACHER), {"name": "sequence_kd"}, losses=("cross_entropy",))},
        {"name": "large", "recipe": recipe(left_by("small"), {"name": "sequence_kd"}, losses=("cross_entropy",))},
    ]
    for stage, rows in zip(content["stages"], (1, 64), strict=True):
        del stage["recipe"]["teacher"]
        stage["recipe"]["training"]["per_device_train_batch_size"] = rows
    file = write(tmp_path / "stages.yaml", content)
    gpu = ["--gpu", "80 GiB, 165 TFLOP/s, 1008 GB/s"]
    assert cli.main(["plan", str(file), *gpu]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "stage small:" in said and "stage large:" in said
    assert said[-1].startswith("all stages: ") and said[-1].endswith("at most, in stage large: fits")
    assert cli.main(["plan", str(file), "--json", *gpu]) == 0
    found = json.loads(capsys.readouterr().out)
    totals = {name: stage["memory"]["total"] for name, stage in found["stages"].items()}
    assert found["most"] == "large" and totals["large"] > totals["small"]


def test_a_verb_that_takes_one_recipe_says_where_that_is(tmp_path, content, capsys) -> None:
    file = write(tmp_path / "stages.yaml", content)
    assert cli.main(["sample", str(file)]) == 2
    assert "holds several stages: kdlm sample takes one, as RUN_DIR/NAME/recipe.yaml has it" in capsys.readouterr().err


def test_a_recipe_with_the_name_of_a_stage_alone_says_what_it_is_for(tmp_path, capsys) -> None:
    file = write(tmp_path / "task.yaml", recipe(left_by("general"), HIDDEN) | {"run_dir": str(tmp_path / "run")})
    assert cli.main(["check", str(file)]) == 2
    assert "stage:general: names what a stage leaves" in capsys.readouterr().err
