"""A run of four stages, small and with all that is handed over: students, projectors, an earlier student as teacher."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from kdlm import cli
from kdlm.run_folder import RunFolder
from kdlm.stages.records import Record

STUDENT, TEACHER = {"name": "sandbox", "model": "code-student-tiny"}, {"name": "sandbox", "model": "code-teacher-tiny"}
HIDDEN = {"name": "hidden_kd", "layers": [[0, 1]], "weight": 1.0}
NAMES = ("general", "enhanced", "adapted", "task")


def recipe(
    student: dict[str, Any], method: dict[str, Any], teacher: dict[str, Any] = TEACHER, losses: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {
        "student": student,
        "teacher": teacher,
        "data": {"train": [{"path": "sandbox:code/train", "limit": 1}], "max_length": 32},
        "method": method,
        "losses": [{"name": name} for name in losses],
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 2,
            "use_cpu": True,
        },
        "seed": 0,
    }


def left_by(name: str) -> dict[str, Any]:
    return {"name": "pretrained", "path": f"stage:{name}"}


def staged(run: Path) -> dict[str, Any]:
    """Return the file: projectors go on from the first stage to the second; the last one's teacher is the second's."""
    stages = [
        {"name": "general", "recipe": recipe(STUDENT, HIDDEN)},
        {"name": "enhanced", "recipe": recipe(left_by("general"), HIDDEN), "carry": ["projectors"]},
        {"name": "adapted", "recipe": recipe(left_by("enhanced"), {"name": "taid", "alpha": 0.05})},
        {
            "name": "task",
            "recipe": recipe(
                left_by("adapted"),
                {"name": "logit_kd"},
                {"name": "local", "path": "stage:enhanced"},
                ("forward_kl", "cross_entropy"),
            ),
        },
    ]
    return {"run_dir": str(run), "stages": stages}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def dies_at(point: str, *words: str) -> None:
    """Run `kdlm WORDS` in this process, and kill it with SIGKILL where it comes to a point of the hand-over."""
    whole = Record.write

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(record: Record, run: Path) -> None:
        die() if record.leaves is not None else whole(record, run)

    def after(record: Record, run: Path) -> None:
        whole(record, run)
        if record.leaves is not None:
            die()

    places = {
        "while the student is exported": mock.patch("kdlm.run_folder.flush", die),
        "after the student, before the record": mock.patch.object(Record, "write", before),
        "between two stages": mock.patch.object(Record, "write", after),
        "after the record of what is taken": mock.patch.object(RunFolder, "open", die),
    }
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with places[point]:
        cli.main(words)
