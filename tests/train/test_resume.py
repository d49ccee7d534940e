"""A run that is killed again and again ends as if it had never been."""

import json
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forks import start
from safetensors.torch import load_file

from kdlm import checkpoints
from kdlm.cli import main

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: taid, start: 0.2, alpha: 0.05}
losses: [{name: cross_entropy, weight: {name: linear, start: 0.5, end: 0.0}}]
training:
  max_steps: 60
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  logging_steps: 1
  save_steps: 5
  save_total_limit: 2
  eval_strategy: steps
  eval_steps: 8
  use_cpu: true
run_dir: {RUN}
"""


def begun(recipe: Path, *words: str) -> BaseProcess:
    return start("train", str(recipe), *words)


def step_of(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, Path]:
    written = {}
    for name in ("unbroken", "killed"):
        written[name] = tmp_path / f"{name}.yaml"
        written[name].write_text(RECIPE.replace("{RUN}", str(tmp_path / name)))
    return written


def test_five_kills_leave_no_trace_in_the_weights(recipes: dict[str, Path], tmp_path: Path) -> None:
    whole = begun(recipes["unbroken"])
    whole.join()
    assert whole.exitcode == 0
    run, chance = tmp_path / "killed", random.Random(0)
    words: list[str] = []
    for kill in range(5):
        process = begun(recipes["killed"], *words)
        goal = step_of(run) + chance.randint(3, 9)
        while step_of(run) < goal and process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)  # also in the middle of a checkpoint
        assert process.is_alive(), f"the run ended before kill {kill}"
        process.kill()
        process.join()
        words = ["--resume"]
    last = begun(recipes["killed"], "--resume")
    last.join()
    assert last.exitcode == 0
    assert step_of(run) == 60
    expected, got = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("unbroken", "killed"))
    assert all((expected[name] == got[name]).all() for name in expected)
    states = [
        load_file(tmp_path / n / "checkpoint-60" / "kdlm" / "method_state.safetensors") for n in ("unbroken", "killed")
    ]
    assert all((states[0][name] == states[1][name]).all() for name in ("t", "previous", "momentum"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == sorted(set(steps)), "a step is reported twice"
    assert [folder.name for folder in checkpoints.finished(run)] == ["checkpoint-55", "checkpoint-60"]


def test_a_checkpoint_with_a_flipped_byte_is_refused_by_name(recipes: dict[str, Path], tmp_path: Path, capsys) -> None:
    process = begun(recipes["killed"], "training.max_steps=5")
    process.join()
    assert process.exitcode == 0
    file = tmp_path / "killed" / "checkpoint-5" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    assert main(["train", str(recipes["killed"]), "--resume"]) == 2
    assert "checkpoint-5/model.safetensors: damaged or missing" in capsys.readouterr().err


def test_a_checkpoint_cut_short_is_not_taken_for_one(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
    checkpoints.seal(tmp_path / "checkpoint-5")
    assert checkpoints.finished(tmp_path) == [tmp_path / "checkpoint-5"]
    with pytest.raises(ValueError, match="not a finished checkpoint"):
        checkpoints.verify(tmp_path / "checkpoint-10")
