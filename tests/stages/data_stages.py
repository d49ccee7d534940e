"""A run of four stages of which one makes rows, one captures a teacher's signals, and two train on both."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from four_stages import STUDENT, TEACHER, left_by, recipe

from kdlm import cli
from kdlm.curation.memory import Memory
from kdlm.store import ShardWriter

NAMES = ("answers", "signals", "first", "second")
ROWS = {"path": "stage:answers", "columns": {"prompt": "prompt", "completion": "completion"}}


def pipeline(limit: int = 6) -> dict[str, Any]:
    return {
        "sources": [{"path": "sandbox:arithmetic/train", "limit": limit}],
        "writers": {"teacher": {"name": "local", "path": "sandbox:code-teacher-tiny", "batch_size": 2}},
        "steps": [
            {"name": "generate", "by": "teacher", "sampling": {"max_new_tokens": 6}},
            {"name": "columns", "drop": ["log_probs"]},
        ],
    }


def trained(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    made = recipe(student, {"name": "logit_kd"}, teacher, ("forward_kl",))
    return made | {"data": {"train": [ROWS], "max_length": 64}, "training": made["training"] | {"max_steps": 2}}


def staged(run: Path) -> dict[str, Any]:
    read = {"name": "cached", "path": "stage:signals"}
    asked = {"name": "cached", "of": TEACHER, "format": {"name": "top_k", "k": 8}, "shard_mb": 0.001}
    stages = [
        {"name": "answers", "pipeline": pipeline()},
        {"name": "signals", "capture": trained(STUDENT, asked)},
        {"name": "first", "recipe": trained(STUDENT, read)},
        {"name": "second", "recipe": trained(left_by("first"), read)},
    ]
    return {"run_dir": str(run), "stages": stages}


def dies_in(stage: str, *words: str) -> None:
    """Run `kdlm WORDS` in this process, and kill it with SIGKILL in the middle of a stage's work."""
    calls: list[int] = []

    def second(whole: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*given, **options)

        return call

    places = {
        "answers": mock.patch.object(Memory, "add", second(Memory.add)),
        "signals": mock.patch.object(ShardWriter, "seal", second(ShardWriter.seal)),
    }
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with places[stage]:
        cli.main(words)
