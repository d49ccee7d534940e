"""Pieces of code and the module of the standard library that each is from: texts with exact classes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.corpus import stdlib_digest, stdlib_documents
from kdlm.sandbox.jsonl import write_jsonl
from kdlm.sandbox.progress import Progress

MODULES = ("argparse", "decimal", "doctest", "inspect", "ipaddress", "subprocess", "tarfile", "turtle")
FILES = {"decimal": "_pydecimal.py"}
"""Where a module's source is, if not in a file of its name."""


@dataclass(frozen=True)
class CodeModules:
    """Pieces of `lines` lines of a module's source, comments and blank lines too; every fifth of them is for eval."""

    lines: int = 4
    held_out: int = 5
    needs: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "documents": stdlib_digest()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        rows = list(self._rows())
        splits = {
            "train": [row for number, row in rows if number % self.held_out],
            "eval": [row for number, row in rows if not number % self.held_out],
        }
        for split, kept in splits.items():
            write_jsonl(folder / f"{split}.jsonl", kept)
        return {split: len(kept) for split, kept in splits.items()}

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        sources = {document.path: document.text for document in stdlib_documents()}
        for module in MODULES:
            lines = [line for line in sources[FILES.get(module, f"{module}.py")].splitlines() if line.strip()]
            for number, start in enumerate(range(0, len(lines) - self.lines + 1, self.lines)):
                yield number, {"text": "\n".join(lines[start : start + self.lines]), "label": module}
