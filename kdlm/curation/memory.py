"""Memory: what a writer has said, kept so that a kill loses nothing and nothing is asked twice.

One file of lines for everything that its texts depend on: writer, sampling, seed. A line is one answered request and is
flushed before the next one; a last line that a kill broke off is cut. Which rows a pipeline has does not matter: rows
added later ask for what is not there.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from kdlm.disk import write_text
from kdlm.writers import Answered, Text

ANSWERS, ABOUT, LOCK = "answers.jsonl", "about.json", ".lock"


class Memory:
    """Answers by the hash of what was asked.

    Args:
        folder: where they are kept; None keeps them for the life of this object.
        about: what they depend on, written beside them for the reader.

    Raises ValueError where another process writes there.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]):
        self.answers: dict[str, Answered] = {}
        self._file: IO[bytes] | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{folder}: another process writes there: wait for it, or end it") from None
        write_text(folder / ABOUT, json.dumps(about, indent=2))
        self._path = folder / ANSWERS
        self._file = open(self._path, "ab+")
        for key, answer in self._read():
            self.add(key, answer, keep=False)

    def add(self, key: str, answer: Answered, *, keep: bool = True) -> None:
        """Take an answer in; those that came before it under the same key stand in front."""
        before = self.answers.get(key)
        texts = answer.texts if before is None else [*before.texts, *answer.texts]
        if keep and self._file is not None:
            line = {"key": key, "prompt_tokens": answer.prompt_tokens, "texts": [asdict(one) for one in answer.texts]}
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        self.answers[key] = Answered(texts, answer.prompt_tokens)

    def texts(self, key: str) -> list[Text]:
        """Return what is known under a key."""
        return self.answers[key].texts if key in self.answers else []

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._lock.release()
            self._file = None

    def _read(self) -> Iterator[tuple[str, Answered]]:
        assert self._file is not None
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            said = json.loads(line)
            yield said["key"], Answered([Text(**one) for one in said["texts"]], said["prompt_tokens"])
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
