"""`kdlm generate` ended at any moment: by a kill, Ctrl-C, a full disk; it goes on, and ends as an unbroken run does."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from forks import CONTEXT, start
from openai_server import Server, openai_server

from kdlm.cli import main

COUNT = 40


@pytest.fixture
def server() -> Iterator[Server]:
    with openai_server() as server:
        yield server


def pipeline(server: Server, folder: Path, name: str = "out", **writer: Any) -> Path:
    """Write a pipeline and its prompts; return its path."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}", "answer": "w1"}) + "\n" for n in range(COUNT)))
    plan = {
        "sources": [{"path": str(prompts)}],
        "writers": {"it": {"name": "openai", "url": server.url, "model": "tiny", "patience": 5, **writer}},
        "steps": [
            {"name": "generate", "by": "it", "sampling": {"samples_per_prompt": 3}},
            {"name": "verify", "verifier": {"name": "exact"}},
        ],
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(plan))
    return path


def rows(folder: Path) -> list[Any]:
    return pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()


def until(reached: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_run_that_is_killed_five_times_ends_as_an_unbroken_one_and_asks_nothing_twice(
    server: Server, tmp_path: Path
) -> None:
    assert main(["generate", str(pipeline(server, tmp_path, "whole"))]) == 0
    server.asked.clear()
    server.seconds = 0.02
    path, drawn = pipeline(server, tmp_path), random.Random(0)
    for _ in range(5):
        process, before = start("generate", str(path)), len(server.asked)
        until(lambda before=before: len(server.asked) > before + 10)
        time.sleep(drawn.random() / 10)
        process.kill()
        process.join()
    asked = start("generate", str(path))
    asked.join()
    assert asked.exitcode == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert len(server.asked) <= 3 * COUNT + 5 * 2 * 8, "a kill costs at most what was taken: twice the concurrency"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_leaves_at_once_and_goes_on(
    server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    path = pipeline(server, tmp_path, concurrency=4, timeout=100)
    server.script = [0.0] * 20 + [30.0] * 4  # these hang, and nobody waits for them
    process = start("generate", str(path))
    until(lambda: len(server.asked) == 24)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(process.pid or 0, number)
    process.join(20)
    assert process.exitcode == 130
    assert time.monotonic() - began < 10
    server.script.clear()
    server.asked.clear()
    assert main(["generate", str(path)]) == 0
    assert len(server.asked) == 3 * COUNT - 20


def limited(path: str, size: int) -> None:
    """Run with files of at most so many bytes, which the kernel refuses as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with open(f"{path}.said", "w") as said:
        os.dup2(said.fileno(), 2)
    os._exit(main(["generate", path]))


def test_a_disk_that_is_full_ends_the_run_with_what_to_do_and_nothing_is_lost(server: Server, tmp_path: Path) -> None:
    path = pipeline(server, tmp_path)
    process = CONTEXT.Process(target=limited, args=(str(path), 6000))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    lines = next(tmp_path.glob("out/answers/*/lines.jsonl"))
    assert "mend that (free space) and run the same command" in Path(f"{path}.said").read_text()
    kept = lines.read_bytes()
    assert 5500 < len(kept) <= 6000 and kept.endswith(b"\n")
    server.asked.clear()
    assert main(["generate", str(path)]) == 0
    assert len(server.asked) == 3 * COUNT - kept.count(b"\n")


def test_two_processes_do_not_work_in_one_folder(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline(server, tmp_path)
    server.seconds = 0.2
    process = start("generate", str(path))
    until(lambda: len(server.asked) > 2)
    assert main(["generate", str(path)]) == 2
    assert "another process works there" in capsys.readouterr().err
    process.kill()
    process.join()


def test_what_cannot_work_is_refused_before_anything_is_asked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline(server, tmp_path)
    assert main(["generate", str(path), "--check"]) == 0
    assert "solved_high" in capsys.readouterr().out
    for change, said in {
        "steps.1.verifier.column=label": "steps.1: verify: no column 'label'",
        "steps.1.column=text": "steps.1: verify: no column 'text'",
        "steps.0.by=ti": "no writer 'ti'",
        "sources.0.weight=2": "a pipeline reads every row once",
        "steps.0.prompt=Q {question}": "{question} is no column",
    }.items():
        assert main(["generate", str(path), change]) == 2
        assert said in capsys.readouterr().err
    assert not server.asked
