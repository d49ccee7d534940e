"""Verbs in forks of the test's process, which has everything imported already, to be killed."""

import multiprocessing
import os
import threading

from tqdm.std import tqdm

from kdlm.cli import main


def start(*words: str) -> multiprocessing.Process:
    """Run `kdlm WORDS` in a fork, without output."""
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(words,))
    process.start()
    return process


def _quietly(words: tuple[str, ...]) -> None:
    tqdm.set_lock(threading.RLock())  # its own lock is shared with the parent: whoever is killed with it keeps it
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        os._exit(main(words))
