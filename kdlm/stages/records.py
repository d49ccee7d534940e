"""What is kept of a stage in its folder: what it took of others, and what it left."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kdlm import checkpoints
from kdlm.disk import digest_of_file, write_text
from kdlm.models import telling_files

FILE = "stage.json"


@dataclass(frozen=True)
class Record:
    """`stage.json` of a stage's folder.

    Attributes:
        takes: dotted key of the recipe or pipeline -> the stage whose student, rows or signals are there, and their
            fingerprint.
        carried: role -> the stage whose network went on, and the fingerprint of its file.
        leaves: what is handed on, file below the folder -> checksum: the files of student, rows or signals, and those
            of the roles; None before the stage has ended.
    """

    takes: Mapping[str, Mapping[str, str]]
    carried: Mapping[str, Mapping[str, str]]
    leaves: Mapping[str, str] | None = None

    @property
    def fingerprint(self) -> str | None:
        """What tells the student, rows or signals that were left from any other; None before there are any."""
        if self.leaves is None:
            return None
        roles = f"{checkpoints.AUXILIARY}/"
        taken = [f"{name} {digest}" for name, digest in sorted(self.leaves.items()) if not name.startswith(roles)]
        return xxhash.xxh3_128("\n".join(taken).encode()).hexdigest()

    def left(self, role: str) -> str | None:
        """Return the fingerprint of a role's network; None where it was not left."""
        return (self.leaves or {}).get(f"{checkpoints.AUXILIARY}/{role}.safetensors")

    def write(self, run: Path) -> None:
        content: dict[str, Any] = {"takes": self.takes, "carried": self.carried, "leaves": self.leaves}
        write_text(run / FILE, json.dumps(content, indent=1) + "\n")

    def verify(self, run: Path) -> None:
        """Raise ValueError, naming the file, where what lies in the folder is not what the stage left."""
        for name, digest in (self.leaves or {}).items():
            path = run / name
            if not path.is_file() or digest_of_file(path) != digest:
                raise ValueError(
                    f"{path}: {'changed since the stage left it' if path.is_file() else 'missing'}: put it back, or "
                    f"delete {run}, and the stages that were made of it, to run them again"
                )


def read(run: Path) -> Record | None:
    """Return the record of a run folder; None where there is none."""
    if not (run / FILE).is_file():
        return None
    return Record(**json.loads((run / FILE).read_text(encoding="utf-8")))


def leaves(run: Path, left: str = "student") -> dict[str, str]:
    """Return the checksums of what a stage has left, by file.

    Args:
        run: its folder.
        left: what is handed on, below it: of a student all files but the card, and networks beside it; else a file, or
            all files of a folder but hidden ones.
    """
    if left == "student":
        files = [*telling_files(run / left), *sorted((run / checkpoints.AUXILIARY).glob("*.safetensors"))]
    elif (run / left).is_file():
        files = [run / left]
    else:
        files = sorted(path for path in (run / left).rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(run)): digest_of_file(path) for path in files}
