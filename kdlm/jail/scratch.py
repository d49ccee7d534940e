"""Scratch: the folder of a program, looked at and removed without trust in what lies there."""

import contextlib
import math
import os
import secrets
import shutil
import stat

DEEPEST, LONGEST = 64, 2048
"""Folders within folders and characters of a path: more than a program needs, and less than calls take."""


def size(folder: str, enough: float, depth: int = 0, within: int | None = None) -> float:
    """Return the bytes that files and names take there, or any number over `enough`.

    Infinite below `DEEPEST`, and where a folder is closed to us: who may not list it may still write into it. The
    program may be at work there: no link is followed, also where it was a folder a moment ago.
    """
    if depth > DEEPEST:
        return math.inf
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    except PermissionError:
        return math.inf
    except OSError:  # gone meanwhile
        return 0.0
    total = 0.0
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # gone meanwhile, which says nothing of the others
                    total += 512 + 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        total += size(entry.name, enough - total, depth + 1, place)
                if total > enough:
                    break
    finally:
        os.close(place)
    return total


def remove(folder: str) -> None:
    """Remove a folder whose program has ended: whatever its modes, its depth and its links.

    What is nested too deep for Python's own removal is first moved up, piece by piece.
    """
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        os.chmod(place, stat.S_IRWXU)
        with os.scandir(place) as entries:
            inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in inner:
            if too_deep := depth >= DEEPEST or len(path) > LONGEST:
                os.rename(path, path := os.path.join(folder, secrets.token_hex(16)))
            waiting.append((path, 0 if too_deep else depth + 1))
    shutil.rmtree(folder)
