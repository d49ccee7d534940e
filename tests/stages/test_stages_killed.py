"""A run of stages that is killed in every one of them, and at every point between two, ends as if it had not been."""

import json
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forks import CONTEXT, start
from four_stages import NAMES, dies_at, staged, write
from safetensors.torch import load_file

POINTS = {
    "while the student is exported": "general",
    "after the student, before the record": "general",
    "between two stages": "general",
    "after the record of what is taken": "enhanced",
}


def step_of(stage: Path) -> int:
    lines = (stage / "metrics.jsonl").read_text().splitlines() if (stage / "metrics.jsonl").exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:
        return 0


def killed_in(stage: Path, process: BaseProcess, step: int, chance: random.Random) -> None:
    while step_of(stage) < step and process.is_alive():
        time.sleep(0.002)
    time.sleep(chance.random() * 0.01)  # also in the middle of a checkpoint
    assert process.is_alive(), f"the run ended before it was killed in {stage.name}"
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    whole = start("train", str(write(folder / "stages.yaml", staged(folder / "run"))))
    whole.join()
    assert whole.exitcode == 0
    return folder / "run"


def finishes_as(unbroken: Path, file: Path, run: Path) -> None:
    last = start("train", str(file), "--resume")
    last.join()
    assert last.exitcode == 0
    for stage in NAMES:
        expected, got = (load_file(folder / stage / "student" / "model.safetensors") for folder in (unbroken, run))
        assert all((expected[name] == got[name]).all() for name in expected), stage
    carried = [(folder / "general" / "kdlm" / "projectors.safetensors").read_bytes() for folder in (unbroken, run)]
    assert carried[0] == carried[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_in_every_stage_leaves_no_trace_in_the_weights(tmp_path: Path, unbroken: Path) -> None:
    file, run, chance = write(tmp_path / "stages.yaml", staged(tmp_path / "run")), tmp_path / "run", random.Random(0)
    words: list[str] = []
    for stage in NAMES:
        killed_in(run / stage, start("train", str(file), *words), chance.randint(1, 3), chance)
        assert not (run / stage / "student").exists()
        words = ["--resume"]
    finishes_as(unbroken, file, run)
    steps = [json.loads(line)["step"] for line in (run / "task" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) == set(range(1, 7))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_every_point_between_two_stages_leaves_no_trace_in_the_weights(
    tmp_path: Path, unbroken: Path
) -> None:
    file, run = write(tmp_path / "stages.yaml", staged(tmp_path / "run")), tmp_path / "run"
    words: list[str] = []
    for point, stage in POINTS.items():
        process = CONTEXT.Process(target=dies_at, args=(point, "train", str(file), *words))
        process.start()
        process.join()
        assert process.exitcode == -9, point
        assert (run / stage / "stage.json").is_file(), point
        words = ["--resume"]
    assert (run / "general" / "student").is_dir() and not (run / "enhanced" / "recipe.yaml").exists()
    finishes_as(unbroken, file, run)
