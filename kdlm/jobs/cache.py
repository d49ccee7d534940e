"""cache: what was evaluated, by model, task and settings."""

import json
from pathlib import Path
from typing import Any

import xxhash

from kdlm.disk import write_bytes
from kdlm.jobs.digests import digest


def file_name(name: str) -> str:
    """Return a task's or model's name as a file can have it."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


class Cache:
    """Files `FOLDER/<model>/<task>-<settings>.json`, each with a checksum before its content.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    @property
    def memory(self) -> Path | None:
        """The file that keeps digests of weights."""
        return None if self.folder is None else self.folder / "digests.json"

    def path(self, model: str, name: str, identity: Any = "") -> Path | None:
        """Return where the result of a model is or would be."""
        return None if self.folder is None else self.folder / model / f"{file_name(name)}-{digest(identity)}.json"

    def read(self, path: Path | None) -> Any:
        """Return what is kept, None where there is nothing. Raises ValueError for a file that is damaged."""
        if path is None or not path.is_file():
            return None
        said, _, content = path.read_bytes().partition(b"\n")
        if said.decode("utf-8", "replace") != xxhash.xxh3_64_hexdigest(content):
            raise ValueError(f"{path} is damaged")
        return json.loads(content)

    def write(self, path: Path | None, value: Any) -> None:
        """Keep plain data, whole or not at all."""
        if path is not None:
            content = json.dumps(value, ensure_ascii=False).encode()
            write_bytes(path, xxhash.xxh3_64_hexdigest(content).encode() + b"\n" + content)
