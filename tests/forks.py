"""Verbs in processes of their own that can be killed, and scripts in several that are ranks of one run.

They are forked from a server that has imported everything and does nothing else. A fork of the test's own process would
share its locks: tqdm's lies in shared memory, and whoever is killed with it keeps it from every test that follows.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

from kdlm.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["kdlm.capture", "kdlm.train", "kdlm.stages", "kdlm.curation", "kdlm.serve", "kdlm.serve.app", "uvicorn", "httpx2"]
)


def start(*words: str, daemon: bool = False) -> BaseProcess:
    """Run `kdlm WORDS` in a process of its own, without output."""
    process = CONTEXT.Process(target=_quietly, args=(words, tempfile.gettempdir()), daemon=daemon)
    process.start()
    return process


def _quietly(words: tuple[str, ...], temporary: str) -> None:
    tempfile.tempdir = temporary
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    code = 1
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def on_ranks(count: int, script: Path, folder: Path, *words: str, seconds: float = 110) -> None:
    """Run `script FOLDER WORDS` as so many ranks of gloo on this machine, as torchrun does; as one, without gloo.

    Raises AssertionError with what a rank said when it failed, or when they are not done in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    ranks = [CONTEXT.Process(target=_rank, args=(place, script, folder, words)) for place in places]
    for process in ranks:
        process.start()
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):
            break  # the other one waits for it
        time.sleep(0.05)
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("failed-*")))
    assert [process.exitcode for process in ranks] == [0] * count, said or f"not done after {seconds} seconds"


def _rank(place: dict[str, str], script: Path, folder: Path, words: tuple[str, ...]) -> None:
    os.environ |= place
    sys.argv = [str(script), str(folder), *words]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        rank = place.get("RANK", "0")
        (folder / f"failed-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
