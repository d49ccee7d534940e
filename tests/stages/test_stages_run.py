"""Stages run one after another: what goes on, what begins anew, and what is written of the whole."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import on_ranks
from four_stages import NAMES, staged, write
from safetensors.torch import load_file

from kdlm import cli
from kdlm.recipe import Recipe
from kdlm.stages import records, running

SHORT = ["training.max_steps=2", "training.save_steps=1"]


def first_two(run: Path) -> dict[str, Any]:
    content = staged(run)
    return content | {"stages": content["stages"][:2]}


def test_student_and_projectors_go_on_and_the_optimiser_begins_anew(tmp_path, monkeypatch, capsys) -> None:
    held: list[weakref.ref] = []
    train_one, assemble = running.train_one, running.train_one.__globals__["assemble"]

    def watched(recipe: Recipe):
        gc.collect()
        assert not any(one() is not None for one in held), "an earlier stage's models are still in memory"
        assembly = assemble(recipe)
        held.extend([weakref.ref(assembly.trainer.student), weakref.ref(assembly.trainer.teacher)])
        return assembly

    monkeypatch.setitem(train_one.__globals__, "assemble", watched)
    file, run = write(tmp_path / "stages.yaml", first_two(tmp_path / "run")), tmp_path / "run"
    assert cli.main(["train", str(file), *SHORT, "enhanced.training.learning_rate=0"]) == 0
    assert len(held) == 4
    before = load_file(run / "general/kdlm/projectors.safetensors")
    after = load_file(run / "enhanced/checkpoint-1/kdlm/projectors.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    weights = [load_file(run / name / "student/model.safetensors") for name in ("general", "enhanced")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert json.loads((run / "enhanced/checkpoint-1/trainer_state.json").read_text())["global_step"] == 1
    record = records.read(run / "enhanced")
    general = records.read(run / "general")
    assert record is not None and general is not None
    assert record.takes == {"student.path": {"stage": "general", "fingerprint": general.fingerprint}}
    assert record.carried == {"projectors": {"stage": "general", "fingerprint": general.left("projectors")}}
    results = json.loads((run / "results.json").read_text())["stages"]
    assert list(results) == ["general", "enhanced"] and results["enhanced"]["steps"] == 2
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert said == [
        f"stage 1/2 general: {run / 'general'}",
        f"stage 2/2 enhanced: {run / 'enhanced'}, student of general, projectors of general",
    ]


def test_a_stage_may_be_skipped_and_the_run_of_what_was_written_is_the_same(tmp_path, capsys) -> None:
    content = staged(tmp_path / "run")
    content["stages"] = [content["stages"][0], content["stages"][2]]
    content["stages"][1]["recipe"]["student"]["path"] = "stage:general"
    file, run = write(tmp_path / "stages.yaml", content), tmp_path / "run"
    assert cli.main(["train", str(file), *SHORT, "general.skip=true"]) == 0
    assert not (run / "general").exists()
    results = json.loads((run / "results.json").read_text())["stages"]
    assert results["general"] == {"skipped": True} and results["adapted"]["steps"] == 2
    capsys.readouterr()
    assert cli.main(["train", str(run / "stages.yaml"), "--resume"]) == 0
    assert f"stage 2/2 adapted: ended before, in {run / 'adapted'}" in capsys.readouterr().out
    assert cli.main(["train", str(file), *SHORT, "general.skip=true"]) == 2
    assert "already holds a run; go on with --resume" in capsys.readouterr().err
    assert cli.main(["train", str(file), "--resume", str(run / "adapted/checkpoint-1")]) == 2
    assert "--resume takes no checkpoint here" in capsys.readouterr().err


def test_a_teachers_placement_is_settled_for_each_stage_and_anew_when_resumed(tmp_path) -> None:
    content = first_two(tmp_path / "run")
    file, run = write(tmp_path / "stages.yaml", content), tmp_path / "run"
    assert cli.main(["train", str(file), *SHORT, "teacher.placement=auto"]) == 0
    for name in ("general", "enhanced"):
        assert json.loads((run / name / "environment.json").read_text())["teacher_placement"]["placement"] == "resident"
    assert cli.main(["train", str(file), *SHORT, "teacher.placement=auto", "--resume"]) == 0


def test_a_stage_that_a_guard_stops_ends_the_run(tmp_path) -> None:
    content = first_two(tmp_path / "run")
    content["stages"][0]["recipe"]["guards"] = {"every": 1, "entropy": {"stop": {"below": 1e9}, "patience": 1}}
    file = write(tmp_path / "stages.yaml", content)
    assert cli.main(["train", str(file), *SHORT, "training.logging_steps=1"]) == 1
    assert (tmp_path / "run/general/results.json").is_file() and not (tmp_path / "run/enhanced").exists()
    assert list(json.loads((tmp_path / "run/results.json").read_text())["stages"]) == ["general"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_go_through_the_stages_together(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks_stages.py")
    alone, both = (tmp_path / name for name in ("alone", "both"))
    same = ["training.max_steps=3", "training.optim=sgd", "training.learning_rate=0.1"]
    assert cli.main(["train", str(write(tmp_path / "alone.yaml", staged(alone))), *same]) == 0
    words = [*same, "training.per_device_train_batch_size=2"]
    file = write(tmp_path / "both.yaml", staged(both))
    on_ranks(2, script, tmp_path, str(file), *words, seconds=300)
    for name in NAMES:
        assert json.loads((both / name / "environment.json").read_text())["processes"] == 2
        expected, got = (load_file(run / name / "student/model.safetensors") for run in (alone, both))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    shutil.copytree(both / "task", tmp_path / "before")
    shutil.rmtree(both / "task")
    on_ranks(2, script, tmp_path, str(file), *words, "--resume", seconds=300)
    again, before = (load_file(folder / "student/model.safetensors") for folder in (both / "task", tmp_path / "before"))
    assert all(torch.equal(again[key], before[key]) for key in before)
