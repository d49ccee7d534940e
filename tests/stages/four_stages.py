"""A run of four stages, small and of all that a hand-over knows: students, roles that go on, an earlier student as teacher."""

from pathlib import Path

import yaml

STUDENT, TEACHER = {"name": "sandbox", "model": "code-student-tiny"}, {"name": "sandbox", "model": "code-teacher-tiny"}
HIDDEN = {"name": "hidden_kd", "layers": [[0, 1]], "weight": 1.0}
NAMES = ("general", "enhanced", "adapted", "task")


def recipe(student: dict, method: dict, teacher: dict = TEACHER, losses: tuple[str, ...] = ()) -> dict:
    return {
        "student": student,
        "teacher": teacher,
        "data": {"train": [{"path": "sandbox:code/train", "limit": 4}], "max_length": 32, "eval_rows": 1},
        "method": method,
        "losses": [{"name": name} for name in losses],
        "training": {
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 3,
            "save_total_limit": 2,
            "use_cpu": True,
        },
        "seed": 0,
    }


def left_by(name: str) -> dict:
    return {"name": "pretrained", "path": f"stage:{name}"}


def staged(run: Path) -> dict:
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


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
