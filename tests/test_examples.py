"""The examples run as a reader would run them, in a process of their own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def distilled_losses(folder: Path, *arguments: str) -> list[float]:
    """Run own_script.py in `folder` and return the losses it logged, teacher's training first."""
    command = [sys.executable, str(EXAMPLES / "own_script.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logged = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{'loss'")]
    return [float(entry["loss"]) for entry in logged]


def test_the_student_of_the_own_script_comes_nearer_to_its_teacher_and_leaves_nothing_behind(tmp_path):
    losses = distilled_losses(tmp_path, "--steps", "75")
    assert len(losses) == 6  # three of the teacher, three of the student
    assert losses[5] < 0.5 * losses[3]
    assert list(tmp_path.iterdir()) == []


def test_the_own_script_gives_the_same_losses_chunked_and_whole(tmp_path):
    whole = distilled_losses(tmp_path, "--steps", "25")
    assert distilled_losses(tmp_path, "--steps", "25", "--chunked") == pytest.approx(whole, rel=1e-3)
