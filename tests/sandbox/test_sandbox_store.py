import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kdlm.disk import cache_folder
from kdlm.sandbox import build
from kdlm.sandbox.progress import console, silent
from kdlm.sandbox.store import digest_of, finished_folder

# A builder that notes that it builds, writes half of what it should, and waits for permission to go on.
SLOW_BUILDER = """
import sys, time
from pathlib import Path
from kdlm.sandbox.progress import console
from kdlm.sandbox.store import finished_folder

cache = Path(sys.argv[1])

def make(folder):
    (folder / "half").write_text("half")
    with open(cache / "builds", "a") as builds:
        builds.write("built\\n")
    while not (cache / "go").exists():
        time.sleep(0.01)
    (folder / "half").rename(folder / "whole")
    return {}

print(finished_folder("thing", {"size": 1}, make, cache=cache, progress=console))
"""

# A real build that stops in the middle of its training.
STOPPING_BUILD = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from kdlm.sandbox import build

@contextmanager
def stop_while_training(stage, total):
    def advance(units, note):
        Path(sys.argv[1], "training").touch()
        time.sleep(1_000)
    yield advance

build("code-teacher-tiny", cache=Path(sys.argv[1]), progress=stop_while_training)
"""


def start(script: str, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    ends = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < ends
        time.sleep(0.02)


def write_whole(folder: Path) -> dict:
    (folder / "whole").write_text("half")
    return {"letters": 4}


def test_of_two_processes_one_builds_and_the_other_says_that_it_waits(tmp_path):
    first = start(SLOW_BUILDER, tmp_path)
    wait_for(tmp_path / "builds", first)
    second = start(SLOW_BUILDER, tmp_path)
    assert "another process is building it, waiting" in second.stderr.readline()
    (tmp_path / "go").touch()
    folders = {process.communicate(timeout=60)[0].strip() for process in (first, second)}
    assert first.returncode == second.returncode == 0
    assert len(folders) == 1 and (Path(folders.pop()) / "whole").is_file()
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_that_the_next_one_trips_over(tmp_path):
    victim = start(SLOW_BUILDER, tmp_path)
    wait_for(tmp_path / "builds", victim)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert not [path for path in cache_folder("sandbox", tmp_path).iterdir() if not path.name.startswith(".")]
    folder = finished_folder("thing", {"size": 1}, write_whole, cache=tmp_path, progress=silent)
    assert sorted(path.name for path in folder.iterdir()) == ["sandbox.json", "whole"]
    assert not list(cache_folder("sandbox", tmp_path).glob(".*.partial"))


def test_a_model_whose_training_was_killed_is_built_the_same_by_the_next(tmp_path):
    victim = start(STOPPING_BUILD, tmp_path)
    wait_for(tmp_path / "training", victim)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    rebuilt = build("code-teacher-tiny", cache=tmp_path, progress=None)
    unbroken = build("code-teacher-tiny", progress=None)
    assert rebuilt.name == unbroken.name
    assert (rebuilt / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(rebuilt).num_parameters() > 0


def test_a_build_that_fails_leaves_no_folder(tmp_path):
    def fail(folder: Path) -> dict:
        write_whole(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        finished_folder("thing", {}, fail, cache=tmp_path, progress=silent)
    assert all(path.suffix == ".lock" for path in cache_folder("sandbox", tmp_path).iterdir())
    assert finished_folder("thing", {}, write_whole, cache=tmp_path, progress=silent).is_dir()


def test_a_folder_that_somebody_cut_down_is_built_again(tmp_path):
    folder = finished_folder("thing", {}, write_whole, cache=tmp_path, progress=silent)
    (folder / "sandbox.json").unlink()
    assert finished_folder("thing", {}, write_whole, cache=tmp_path, progress=silent) == folder
    assert (folder / "sandbox.json").is_file()


def test_a_finished_folder_is_not_built_again_and_says_what_it_was_made_from(tmp_path):
    folder = finished_folder("thing", {"size": 1}, write_whole, cache=tmp_path, progress=silent)
    assert finished_folder("thing", {"size": 1}, pytest.fail, cache=tmp_path, progress=silent) == folder
    marker = json.loads((folder / "sandbox.json").read_text())
    assert marker == {"name": "thing", "made_from": {"size": 1}, "figures": {"letters": 4}}


def test_other_ingredients_make_another_folder(tmp_path):
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    first = finished_folder("thing", {"size": 1}, write_whole, cache=tmp_path, progress=silent)
    second = finished_folder("thing", {"size": 2}, write_whole, cache=tmp_path, progress=silent)
    assert first != second and first.is_dir() and second.is_dir()


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLM_CACHE", str(tmp_path))
    assert cache_folder("sandbox") == tmp_path.resolve() / "sandbox"


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with console("thing: training", 2) as advance:
        advance(2, "loss 1.0")
    shown = capsys.readouterr().err
    assert shown.startswith("thing: training ...\n") and "done in" in shown and "\x1b" not in shown
