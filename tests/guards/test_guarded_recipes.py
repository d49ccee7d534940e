"""`kdlm train` and `kdlm check` with a section `guards`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdlm import checkpoints
from kdlm.check import check
from kdlm.cli import main
from kdlm.recipe import load

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 24, eval_rows: 1}
method: {name: custom, target: "collapsing:Minimised"}
losses: []
guards:
  every: 2
  rows: 3
  entropy: {warn: {below_start: 0.98}, stop: {below_start: 0.95}, patience: 2}
  kl_to_start: {stop: {above: 1000}}
training: {max_steps: 16, per_device_train_batch_size: 2, learning_rate: 0.01, logging_steps: 1, use_cpu: true}
run_dir: RUN
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("RUN", str(tmp_path / "run")))
    return path


def test_a_guard_ends_a_run_with_exit_code_1_and_it_goes_on_when_its_limit_is_changed(recipe, tmp_path, capsys) -> None:
    assert main(["train", str(recipe)]) == 1
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    stopped, checkpoint = results["stopped"], checkpoints.finished(run)[-1]
    assert stopped["guard"] == "entropy" and stopped["value"] < 0.95 * stopped["start"]
    assert results["steps"] == stopped["step"] == checkpoints.step_of(checkpoint) < 16
    assert not (run / "student").exists()
    said = capsys.readouterr().out
    assert "stopped by guards.entropy.stop: " in said and f"it is in {checkpoint}" in said

    assert main(["train", str(recipe), "--resume"]) == 2
    refused = capsys.readouterr().err
    assert "its guard stopped the run" in refused and "guards.entropy.stop=null" in refused
    assert json.loads((run / "results.json").read_text()) == results

    assert main(["train", str(recipe), "--resume", "guards.entropy.stop=null"]) == 0
    assert "resuming with a changed guards.entropy.stop" in capsys.readouterr().err
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 16 and "stopped" not in results and "eval_loss" in results
    assert main(["train", str(recipe), "guards=null", f"run_dir={tmp_path / 'whole'}"]) == 0
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_check_says_what_is_watched_and_refuses_what_cannot_be(recipe: Path) -> None:
    assert "guards: entropy, kl_to_start, every 2 steps" in check(load(recipe))
    with pytest.raises(ValueError, match=r"guards\.length: the student writes no text"):
        check(load(recipe, ["guards.length={stop: {below: 1}}"]))
