"""Runs in processes of their own, several at once.

Importing torch and transformers takes seconds of a core. A server process does it once and forks one child for each
run, so a run has nothing of those before it, and one that is killed or runs out of memory takes nobody with it.
"""

import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kdlm.compare.planned import Planned
from kdlm.disk import write_text

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
LOG, SECONDS, LAST = "log.txt", "seconds.json", 12


def run_all(
    runs: Iterable[Planned], workers: int, threads: int, said: Callable[[Planned, str | None], None]
) -> dict[str, str]:
    """Run recipes, going on where one was stopped; return the last lines of those that failed, by folder.

    Args:
        runs: what to run; those that are finished are not run again.
        workers: how many at once.
        threads: torch threads of each.
        said: told of every run that ended, with its last lines if it failed.
    """
    waiting = [run for run in runs if not run.finished]
    failed: dict[str, str] = {}
    if not waiting:
        return failed
    context, alive = multiprocessing.get_context(METHOD), set[BaseProcess]()

    def one(run: Planned) -> str | None:
        process = context.Process(target=child, args=(str(run.path), run.overrides, threads, os.getcwd()))
        process.start()
        alive.add(process)
        process.join()
        alive.discard(process)
        return None if process.exitcode == 0 else last_lines(run.folder, process.exitcode)

    with _server(context), ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(one, run): run for run in waiting}
        try:
            for job in as_completed(jobs):
                if (lines := job.result()) is not None:
                    failed[str(jobs[job].folder)] = lines
                said(jobs[job], lines)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(alive):
                process.terminate()
            raise
    return failed


@contextmanager
def _server(context: Any) -> Iterator[None]:
    """Have the server of the children begin with one thread and the slow imports."""
    before = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if METHOD == "forkserver":
        context.set_forkserver_preload(["kdlm.train"])
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def child(path: str, overrides: Sequence[str], threads: int, here: str) -> None:
    """Train a recipe, as `kdlm train PATH OVERRIDES --resume` does; what it prints goes to the run folder's log."""
    parent = multiprocessing.parent_process()
    if parent is not None:  # nobody would read what is made when the command is gone, and it would meet the next one
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.chdir(here)
    from kdlm.recipe import load

    folder = (recipe := load(path, overrides)).run_dir
    folder.mkdir(parents=True, exist_ok=True)
    fresh, began, worked = not (folder / "recipe.yaml").exists(), time.perf_counter(), time.process_time()
    with open(folder / LOG, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import torch

    from kdlm.plan import settled
    from kdlm.train import train

    torch.set_num_threads(threads)
    recipe, placement = settled(recipe)
    train(recipe, resume=True, placement=placement)
    if fresh:
        taken = {"wall": time.perf_counter() - began, "cpu": time.process_time() - worked}
        write_text(folder / SECONDS, json.dumps(taken))


def seconds_of(folder: Path) -> dict[str, float]:
    """Return the seconds a run took, `wall` and `cpu`; nan where it was stopped in between, and nobody knows."""
    path = folder / SECONDS
    return json.loads(path.read_text()) if path.is_file() else {"wall": math.nan, "cpu": math.nan}


def last_lines(folder: Path, code: int | None) -> str:
    """Return the end of what a run printed, and how its process ended where it was killed."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines()[-LAST:] if path.is_file() else []
    return "\n".join([*lines, *([f"killed by signal {-code}"] if code is not None and code < 0 else [])])
