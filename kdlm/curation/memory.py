"""Memory: what was answered or judged, kept so that a kill loses nothing and nothing is done twice.

A file of lines for everything that its values depend on: writer, sampling and seed; verifier. A line is a key and plain
data. It goes to the kernel in one call before its key counts as known, and to the disk every `SECONDS`: a kill loses
nothing, a power cut what was answered in these seconds. In memory are keys and places in the file, some 250 bytes a
line, and never a text.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from kdlm.disk import write_text

LINES, ABOUT = "lines.jsonl", "about.json"
SECONDS = 5.0
"""Between two times that what was written is brought to disk, while there is something to write."""
LENGTH = 32
"""Bits of a place that say how long a line is; those above say where it begins."""


class Memory:
    """Plain data by key.

    Args:
        folder: where they are kept; None keeps them for the life of this object.
        about: what they depend on, written beside them for the reader.
        seen: called with every key and value that is there already.

    Raises ValueError for a line that is damaged. The last one is cut where it was broken off.
    """

    def __init__(
        self, folder: Path | None, about: Mapping[str, Any], seen: Callable[[str, Any], None] = lambda key, value: None
    ):
        self._places: dict[str, int] = {}
        self._file: IO[bytes]
        if folder is None:
            self.path = Path(tempfile.gettempdir())
            self._file = tempfile.TemporaryFile(buffering=0)
        else:
            self.path = folder / LINES
            write_text(folder / ABOUT, json.dumps(about, indent=2))
            self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        self._end = 0
        self._synced = time.monotonic()
        try:
            self._read(seen)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Return what is known under a key, with the `key`."""
        place = self._places[key]
        return json.loads(os.pread(self._file.fileno(), place & ((1 << LENGTH) - 1), place >> LENGTH))

    def add(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep values, in one write. Raises OSError with what to do where that cannot be: the file is as before."""
        lines = {key: _line({"key": key, **value}) for key, value in values.items()}
        content, done = b"".join(lines.values()), 0
        try:
            while done < len(content):
                done += os.pwrite(self._file.fileno(), content[done:], self._end + done)
            self._to_disk(SECONDS)
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._end)
            raise OSError(
                error.errno,
                f"{self.path}: {error.strerror}: the last answer could not be kept, and is asked for again; what came "
                f"before it, {len(self)} lines, is kept: mend that (free space) and run the same command",
            ) from error
        for key, line in lines.items():
            self._places.setdefault(key, self._end << LENGTH | len(line))
            self._end += len(line)

    def close(self) -> None:
        """Bring everything to disk."""
        try:
            self._to_disk(0.0)
        finally:
            self._file.close()

    def _to_disk(self, after: float) -> None:
        if time.monotonic() - self._synced >= after:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _read(self, seen: Callable[[str, Any], None]) -> None:
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break  # broken off by a kill: asked again
                try:
                    value = json.loads(line)
                    key = value["key"]
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: a damaged line ({error!r}): delete it (sed -i {number}d {self.path}), "
                        "and what it held is asked for again"
                    ) from error
                self._places.setdefault(key, self._end << LENGTH | len(line))
                self._end += len(line)
                seen(key, value)
        os.ftruncate(self._file.fileno(), self._end)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n"
