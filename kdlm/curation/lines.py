"""Lines: records kept one a line as they come, so that a kill loses none and nothing is worked out twice."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdlm.disk import write_text

LINES, ABOUT, LOCK = "lines.jsonl", "about.json", ".lock"


class Lines:
    """A file of JSON records; each is flushed before the next one, and a last line that a kill broke off is cut.

    Args:
        folder: where they are kept; None keeps nothing.
        about: what the records depend on, written beside them for the reader.

    Raises ValueError where another process writes there.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]):
        self._file = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{folder}: another process writes there: wait for it, or end it") from None
        write_text(folder / ABOUT, json.dumps(about, indent=2))
        self._file = open(folder / LINES, "ab+")

    def read(self) -> Iterator[Any]:
        """Yield the records that were kept before."""
        if self._file is None:
            return
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            yield json.loads(line)
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def add(self, record: Any) -> None:
        """Keep a record."""
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._lock.release()
            self._file = None
