"""log: what the harness logs, prints and draws as bars goes to a file; a terminal shows the bar of the moment."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

BAR = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*")
"""A bar as tqdm draws it."""


@contextlib.contextmanager
def told_to(path: Path, doing: str) -> Iterator[None]:
    """Send what is said from here on to the end of a file; a terminal shows, in one line, what is done and how far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, _line(doing) as show:
        told: Any = _Told(file, show)
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            yield


class _Told:
    """A file that shows the last bar of what is written to it."""

    def __init__(self, file: TextIO, show: Callable[[str], None]):
        self._file, self._show = file, show

    def write(self, text: str) -> int:
        if bars := BAR.findall(text):
            self._show(bars[-1])
        return self._file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def _line(doing: str) -> Iterator[Callable[[str], None]]:
    """Yield what shows a text behind `doing`: on a terminal in a line that goes away at the end, elsewhere nowhere."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def text(far: str) -> Text:
        return Text(f"{doing} {far}", no_wrap=True, overflow="ellipsis")

    console = Console(file=sys.stderr)  # this one: what is redirected from here on is not shown
    with Live(text("..."), console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
        yield lambda far: live.update(text(far))
