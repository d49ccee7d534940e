"""Scratch: the folder of a program, looked at and removed without trust in what lies there."""

import os
import shutil
import stat

DEEPEST, LONGEST = 64, 2048
"""Folders within folders and characters of a path: more than a program needs, and less than calls take."""


def size(folder: str, depth: int = 0) -> float:
    """Return the bytes that files and names take there; infinite where folders are nested too deep to be counted."""
    if depth > DEEPEST or len(folder) > LONGEST:
        return float("inf")
    total = 0.0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                total += 512 + entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    total += size(entry.path, depth + 1)
    except OSError:  # gone meanwhile, or closed to us: to the program too, while it runs
        pass
    return total


def remove(folder: str) -> None:
    """Remove a folder whose program has ended: whatever its modes, its depth and its links.

    What is nested too deep for Python's own removal is first moved up, piece by piece.
    """
    moved = 0
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        os.chmod(place, stat.S_IRWXU)
        with os.scandir(place) as entries:
            inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in inner:
            if too_deep := depth >= DEEPEST or len(path) > LONGEST:
                os.rename(path, path := os.path.join(folder, f"moved-{moved}"))
                moved += 1
            waiting.append((path, 0 if too_deep else depth + 1))
    shutil.rmtree(folder)
