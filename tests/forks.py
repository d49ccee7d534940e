"""Verbs in processes of their own that can be killed.

They are forked from a server that has imported everything and does nothing else. A fork of the test's own process would
share its locks: tqdm's lies in shared memory, and whoever is killed with it keeps it from every test that follows.
"""

import multiprocessing
import os
import tempfile
from multiprocessing.process import BaseProcess

from kdlm.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kdlm.capture", "kdlm.train", "kdlm.serve", "kdlm.serve.app", "uvicorn", "httpx2"])


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
