"""A file of stages becomes one recipe for each: names become folders, changes reach their stage, errors have places."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from four_stages import NAMES, STUDENT, left_by, recipe, staged, write

from kdlm.recipe import resolved
from kdlm.stages import load
from kdlm.stages.running import spelled_out


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    return staged(tmp_path / "run")


def read(tmp_path: Path, content: dict[str, Any], *changes: str):
    return load(write(tmp_path / "stages.yaml", content), changes)


def problems(tmp_path: Path, content: dict[str, Any], *changes: str) -> str:
    with pytest.raises(ValueError) as error:
        read(tmp_path, content, *changes)
    return str(error.value).replace(str(tmp_path), "")


def test_a_stage_has_a_folder_of_its_own_and_takes_what_the_earlier_ones_left(tmp_path, content) -> None:
    stages = read(tmp_path, content).by_name
    run = tmp_path / "run"
    assert [stage.folder for stage in stages.values()] == [run / name for name in NAMES]
    assert stages["task"].takes == {"student.path": "adapted", "teacher.path": "enhanced"}
    assert stages["task"].recipe.student.path == str(run / "adapted/student")
    teacher: Any = stages["task"].recipe.teacher
    assert teacher.path == str(run / "enhanced/student")
    assert stages["general"].takes == {} and stages["enhanced"].before == "general"


def test_a_name_may_stand_deep_in_a_recipe(tmp_path, content) -> None:
    pruned = {"name": "pruned", "source": left_by("general"), "layers": 1}
    member = {"name": "local", "path": "stage:general"}
    content["stages"][1] |= {"carry": [], "recipe": recipe(pruned, {"name": "logit_kd"}, losses=("forward_kl",))}
    content["stages"][1]["recipe"]["teacher"] = {"name": "ensemble", "members": [member, member]}
    stage = read(tmp_path, content).by_name["enhanced"]
    assert set(stage.takes) == {"student.source.path", "teacher.members.0.path", "teacher.members.1.path"}
    assert stage.before == "general"


def test_a_recipe_may_be_a_file_beside_the_file_of_stages(tmp_path, content, monkeypatch) -> None:
    write(tmp_path / "general.yaml", content["stages"][0]["recipe"] | {"run_dir": "runs/elsewhere"})
    inline = resolved(read(tmp_path, content).by_name["general"].recipe)
    content["stages"][0]["recipe"] = "general.yaml"
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert resolved(read(tmp_path, content).by_name["general"].recipe) == inline


def test_a_change_reaches_its_stage_every_stage_or_the_file(tmp_path, content) -> None:
    content["stages"][1]["set"] = {"training.max_steps": 7, "seed": 5}
    run = read(tmp_path, content, "seed=3", "task.training.max_steps=2", "run_dir=other", "general.skip=true")
    assert [stage.recipe.seed for stage in run.stages] == [3, 3, 3, 3]  # the command line wins over the file
    assert [stage.recipe.training.max_steps for stage in run.stages] == [6, 7, 6, 2]
    assert run.run_dir == Path("other") and run.stages[3].folder == Path("other/task")
    assert [stage.skip for stage in run.stages] == [True, False, False, False]


def test_a_skipped_stage_hands_on_what_it_would_have_begun_with(tmp_path, content) -> None:
    run = read(tmp_path, content, "adapted.skip=true")
    assert run.by_name["task"].takes == {"student.path": "enhanced", "teacher.path": "enhanced"}
    run = read(tmp_path, content, "general.skip=true", "enhanced.student.dtype=bfloat16")
    first = run.by_name["enhanced"]
    assert first.recipe.student.name == "sandbox" and first.recipe.student.model == STUDENT["model"]
    assert first.recipe.student.dtype == "bfloat16" and first.anew and first.takes == {}


def test_a_teacher_from_a_skipped_stage_that_began_with_no_stages_student_is_refused(tmp_path, content) -> None:
    content["stages"][3]["recipe"]["teacher"]["path"] = "stage:general"
    said = problems(tmp_path, content, "general.skip=true")
    assert "stage task: " in said and "teacher.path: the stage 'general' is skipped and began with no stage's" in said


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("stage:enhancd", "no stage 'enhancd', did you mean enhanced?"),
        ("stage:task", "the stage 'task' comes later"),
        ("stage:adapted", "the stage 'adapted' is this one"),
    ],
)
def test_a_stage_takes_only_what_earlier_ones_leave_and_the_error_has_its_place(tmp_path, content, named, said) -> None:
    content["stages"][2]["recipe"]["student"]["path"] = named
    text = write(tmp_path / "stages.yaml", content).read_text().splitlines()
    line = next(number for number, line in enumerate(text, 1) if named in line)
    found = problems(tmp_path, content)
    assert found.startswith(f"stage adapted: /stages.yaml:{line}: student.path: {said}")


def test_errors_of_several_stages_come_at_once_each_where_it_was_written(tmp_path, content) -> None:
    broken = content["stages"][0]["recipe"]
    broken["training"]["max_stps"] = 3
    write(tmp_path / "general.yaml", broken)
    content["stages"][0]["recipe"] = "general.yaml"
    content["stages"][1]["set"] = {"seed": -1}
    lines = problems(tmp_path, content, "task.data.max_length=no", "genral.seed=1").splitlines()
    said = dict(line.split(": ", 1) for line in lines)
    line = next(n for n, t in enumerate((tmp_path / "general.yaml").read_text().splitlines(), 1) if "max_stps" in t)
    assert f"/general.yaml:{line}: training.max_stps: unknown key, did you mean max_steps?" in said["stage general"]
    line = next(n for n, t in enumerate((tmp_path / "stages.yaml").read_text().splitlines(), 1) if "seed: -1" in t)
    assert said["stage enhanced"].startswith(f"/stages.yaml:{line}: set.seed: must be greater than or equal to 0")
    assert said["stage task"].startswith("override 'data.max_length=no': expected a whole number")
    assert said["override 'genral.seed=1'"].endswith("called 'genral', did you mean general?")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "student"}, "stages.1.name: 'student' is a key of a recipe: choose another name"),
        ({"name": "general"}, "stages.1.name: 'general' is the name of an earlier stage already"),
        ({"name": "a/b"}, "stages.1.name: "),
        ({"carries": ["projectors"]}, "stages.1.carries: unknown key, did you mean carry?"),
        ({"set": {"run_dir": "x"}}, "set.run_dir: is RUN_DIR/NAME in a run of stages: leave it out"),
        ({"set": {"losses.3.weight": 1}}, "losses has no entries, not '3'"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_with_its_line(tmp_path, content, change, said) -> None:
    content["stages"][1] |= change
    found = problems(tmp_path, content)
    assert said in found and "/stages.yaml:" in found


def test_what_was_run_is_written_as_one_file_that_reads_back_as_the_same_run(tmp_path, content) -> None:
    run = read(tmp_path, content, "seed=4", "adapted.skip=true")
    (tmp_path / "again.yaml").write_text(spelled_out(run))
    again = load(tmp_path / "again.yaml")
    assert [resolved(stage.recipe) for stage in again.stages] == [resolved(stage.recipe) for stage in run.stages]
    assert [(stage.takes, stage.carry, stage.skip) for stage in again.stages] == [
        (stage.takes, stage.carry, stage.skip) for stage in run.stages
    ]
    first = yaml.safe_load((tmp_path / "again.yaml").read_text())["stages"][1]["recipe"]
    assert first["student"]["path"] == "stage:general" and "run_dir" not in first
