"""Where finished folders live, and how a folder comes to be finished.

A folder is written under a temporary name beside its place, flushed and renamed, so that whoever sees it sees it
whole. A lock per name, which dies with its process, lets one process build while others wait. The temporary name is
one per name too: whoever holds the lock may remove what a killed builder left.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdlm.disk import cache_folder, flush, flush_names
from kdlm.sandbox.progress import Progress

MARKER = "sandbox.json"  # written last: what the folder was built from


def digest_of(ingredients: dict[str, Any]) -> str:
    """Return the content hash of everything that determines a folder, as 16 hexadecimal digits."""
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_of(name: str, ingredients: dict[str, Any], cache: Path | None) -> Path:
    """Return where the folder lives, built or not."""
    return cache_folder("sandbox", cache) / f"{name}-{digest_of(ingredients)}"


def is_finished(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def finished_folder(
    name: str,
    ingredients: dict[str, Any],
    make: Callable[[Path], dict[str, Any]],
    *,
    cache: Path | None,
    progress: Progress,
) -> Path:
    """Return the folder of `name` made from `ingredients`; call `make(empty folder)` if there is none yet.

    What `make` returns (figures worth keeping) goes into the folder's `sandbox.json` beside the ingredients.
    """
    folder = folder_of(name, ingredients, cache)
    if is_finished(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{name}.lock")
    _acquire(lock, name, progress)
    try:
        if not is_finished(folder):  # it is when the process that we waited for has built it
            _build(name, ingredients, make, folder)
    finally:
        lock.release()
    return folder


def _build(name: str, ingredients: dict[str, Any], make: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    """Make the folder. The caller holds the lock of the name."""
    partial = folder.parent / f".{name}.partial"
    for leftover in (partial, folder):  # of a builder that was killed; of somebody who cut a folder down by hand
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        marker = {"name": name, "made_from": ingredients, "figures": make(partial)}
        (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)
    flush_names(folder.parent)


def _acquire(lock: FileLock, name: str, progress: Progress) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress(f"{name}: another process is building it, waiting", 0):
            lock.acquire()
