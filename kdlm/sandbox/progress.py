"""What a build shows while it runs: a bar on a terminal, plain lines elsewhere.

A `Progress` is called once per stage and gives a context manager; what that gives is called with the number of
units done since the last call, and a note:

    with progress("code-teacher: training", 1_400) as advance:
        advance(1, "loss 4.53")
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

Advance = Callable[[int, str], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def console(stage: str, total: int) -> Iterator[Advance]:
    """Show a stage of `total` units on stderr; 0 units for a stage whose length nobody knows."""
    show = _bar if sys.stderr.isatty() else _lines
    with show(stage, total) as advance:
        yield advance


@contextmanager
def silent(stage: str, total: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda units, note: None


@contextmanager
def _bar(stage: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += [MofNCompleteColumn(), TimeRemainingColumn()] if total else []
    columns += [TimeElapsedColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task(stage, total=total or None, note="")
        yield lambda units, note: bar.update(task, advance=units, note=note)


@contextmanager
def _lines(stage: str, total: int) -> Iterator[Advance]:
    started = last = time.monotonic()
    done = 0

    def advance(units: int, note: str) -> None:
        nonlocal done, last
        done += units
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            share = f" {done}/{total}" if total else ""
            left = timedelta(seconds=round((last - started) / done * (total - done))) if 0 < done <= total else None
            eta = "" if left is None else f"  eta {left}"
            print(f"{stage}:{share} {note}".rstrip() + eta, file=sys.stderr, flush=True)

    print(f"{stage} ...", file=sys.stderr, flush=True)
    yield advance
    print(f"{stage}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
