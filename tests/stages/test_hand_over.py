"""What a stage takes is what the earlier one left: every way in which it could be something else is refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from four_stages import NAMES, staged, write
from torch import nn

from kdlm import checkpoints
from kdlm.disk import write_text
from kdlm.recipe import resolved
from kdlm.report.run import run_folders
from kdlm.role_checkpoints import HandOver
from kdlm.stages import StagedRun, load, records
from kdlm.stages.progress import WHOLE, ended
from kdlm.stages.records import Record
from kdlm.stages.running import spelled_out


def leave(run: StagedRun, *names: str, student: str = "weights") -> None:
    """Write what a stage would leave, without training it."""
    for stage in (run.by_name[name] for name in names):
        write_text(stage.folder / "recipe.yaml", resolved(stage.recipe))
        write_text(stage.folder / "student" / "model.safetensors", f"{student} of {stage.name}")
        write_text(stage.folder / "student" / "README.md", "a card")
        if stage.name == "general":
            write_text(stage.folder / "kdlm" / "projectors.safetensors", "projectors")
        known = {
            name: record
            for name in names[: names.index(stage.name)]
            if (record := records.read(run.by_name[name].folder))
        }
        known |= {one.name: record for one in run.stages if (record := records.read(one.folder))}
        takes = {
            key: {"stage": name, "fingerprint": known[name].fingerprint or ""} for key, name in stage.takes.items()
        }
        carried = {role: {"stage": "general", "fingerprint": known["general"].left(role) or ""} for role in stage.carry}
        Record(takes, carried, records.leaves(stage.folder)).write(stage.folder)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "stages.yaml", staged(tmp_path / "run"))


@pytest.fixture
def run(file: Path) -> StagedRun:
    run = load(file)
    leave(run, *NAMES)
    return run


def refused(run: StagedRun) -> str:
    with pytest.raises(ValueError) as error:
        ended(run, resume=True)
    return str(error.value).replace(f"{run.run_dir.parent}/", "")


def test_what_lies_there_as_it_was_left_is_taken_for_ended(run) -> None:
    assert list(ended(run, resume=True)) == list(NAMES)
    (run.by_name["general"].folder / "student" / "README.md").write_text("a card with a remark")
    assert list(ended(run, resume=True)) == list(NAMES)


def test_a_folder_with_a_run_is_not_begun_again(run) -> None:
    with pytest.raises(ValueError, match=r"run_dir: .* already holds a run; go on with --resume"):
        ended(run, resume=False)


def test_an_edited_stage_names_what_changed_where_and_what_was_made_of_it(run, file) -> None:
    text = file.read_text().replace("alpha: 0.05", "alpha: 0.06")
    file.write_text(text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "alpha" in line)
    said = refused(load(file))
    assert said.startswith(f"stage adapted: stages.yaml:{line}: method.alpha: 0.05 -> 0.06, but the stage has ended")
    assert said.endswith("or delete run/adapted, run/task to run it again")


def test_training_arguments_of_an_ended_stage_count_too_and_of_the_running_one_do_not(run, file) -> None:
    record = records.read(run.by_name["task"].folder)
    assert record is not None
    Record(record.takes, record.carried).write(run.by_name["task"].folder)  # it was killed before its end
    assert list(ended(load(file, ["task.training.logging_steps=2"]), resume=True)) == list(NAMES[:3])
    assert "stage general: override 'training.logging_steps=2': 1.0 -> 2.0, but" in refused(
        load(file, ["general.training.logging_steps=2"])
    )


def test_where_the_teacher_was_does_not_make_an_ended_stage_another_one(run, file) -> None:
    """`placement: auto` is settled anew whenever the file is run, and may come to another place."""
    assert list(ended(load(file, ["general.teacher.placement=auto"]), resume=True)) == list(NAMES)
    assert list(ended(load(file, ["general.teacher.batch_size=2"]), resume=True)) == list(NAMES)


def test_a_students_changed_byte_is_seen(run) -> None:
    weights = run.by_name["enhanced"].folder / "student" / "model.safetensors"
    weights.write_text("weights of enhancec")
    assert refused(run) == (
        "stage enhanced: run/enhanced/student/model.safetensors: changed since the stage left it: put it back, or "
        "delete run/enhanced, and the stages that were made of it, to run them again"
    )
    weights.unlink()
    assert "run/enhanced/student/model.safetensors: missing" in refused(run)


def test_a_stage_that_was_made_of_another_student_is_stale(run) -> None:
    leave(run, "general", student="other weights")
    said = refused(run)
    assert "stage enhanced: stages.yaml:" in said
    assert "student.path: made of what stage general had left, which lies there no more: delete run/enhanced, " in said
    assert "run/adapted, run/task to go on" in said


def test_projectors_that_went_on_are_part_of_the_hand_over(run) -> None:
    general = run.by_name["general"].folder
    write_text(general / "kdlm" / "projectors.safetensors", "others")
    Record({}, {}, records.leaves(general)).write(general)
    assert "carry: projectors: made of what stage general had left, which lies there no more" in refused(run)


def test_a_deleted_stage_asks_for_those_that_were_made_of_it(run) -> None:
    run.by_name["enhanced"].folder.rename(run.run_dir / "away")
    said = refused(run)
    assert (
        "stage adapted: " in said and "made of what stage enhanced had left, which has to be run again: delete" in said
    )
    assert "stage task: " in said


def test_a_stage_that_is_skipped_after_it_has_run_makes_those_after_it_stale(run, file) -> None:
    said = refused(load(file, ["adapted.skip=true"]))
    assert "stage task: " in said and "student.path: " in said and "adapted/student' -> " in said


def test_networks_go_on_only_where_they_fit(tmp_path) -> None:
    def networks(width: int):
        return SimpleNamespace(
            role=nn.ModuleDict({"student": nn.Linear(1, 1), "projectors": nn.Linear(2, width)}),
            auxiliary_weights=lambda: {"projectors": source.role["projectors"].state_dict()},
        )

    source, target = networks(3), networks(3)
    HandOver(left=["projectors"]).leave(source, tmp_path, writes=True)  # pyright: ignore[reportArgumentType]
    HandOver({"projectors": tmp_path}).take(target)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(target.role["projectors"].weight, source.role["projectors"].weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"carry: projectors: bias is \[4\] here, and .* left \[3\]"):
        HandOver({"projectors": tmp_path}).take(networks(4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="carry: the method trains no 'critic' beside the student, but projectors"):
        HandOver(left=["critic"]).leave(source, tmp_path, writes=True)  # pyright: ignore[reportArgumentType]


def test_the_report_of_a_run_of_stages_is_that_of_its_stages(run, tmp_path) -> None:
    write_text(run.run_dir / WHOLE, spelled_out(run))
    (run.by_name["task"].folder / "recipe.yaml").unlink()
    found = run_folders([str(run.run_dir), "elsewhere"])
    assert found == [*(run.run_dir / name for name in NAMES[:3]), "elsewhere"]


def test_the_record_names_every_file_by_its_checksum(run) -> None:
    record = json.loads((run.by_name["general"].folder / records.FILE).read_text())
    assert list(record["leaves"]) == ["student/model.safetensors", f"{checkpoints.AUXILIARY}/projectors.safetensors"]
