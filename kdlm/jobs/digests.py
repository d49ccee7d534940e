"""digests: what tells that a model or a task is another one than before."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdlm.disk import digest_of_file, write_text
from kdlm.models import telling_files


def digest(said: Any) -> str:
    """Return the digest of plain data, the same for the same content."""
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def digest_of_folder(folder: Path, memory: Path | None) -> str:
    """Return the digest of a model's folder: weights, configuration and tokenizer, by content and name.

    `memory` is a file that keeps each digest with the size and time of the file it was made of, so that weights are
    read once; None reads them each time.
    """
    return digest([[path.name, _content(path, memory)] for path in telling_files(folder)])


def digest_of_files(paths: Iterable[Path]) -> list[list[str]]:
    """Return name and checksum of some files, in the order of their names."""
    return [[path.name, digest_of_file(path)] for path in sorted(paths)]


def size_of_folder(folder: Path) -> int:
    """Return the bytes of the weights in a model's folder, without the state of a training that lies beside them."""
    kinds = (".safetensors", ".bin", ".gguf")
    return sum(path.stat().st_size for path in telling_files(folder) if path.suffix in kinds)


def _content(path: Path, memory: Path | None) -> str:
    stat = path.stat()
    key, now = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    known = _read(memory)
    if (found := known.get(key)) and found[:2] == now:
        return found[2]
    content = digest_of_file(path)
    if memory is not None:
        write_text(memory, json.dumps({**_read(memory), key: [*now, content]}))
    return content


def _read(memory: Path | None) -> dict[str, Any]:
    try:
        return json.loads(memory.read_text()) if memory is not None and memory.is_file() else {}
    except ValueError:  # torn by something else than us: what it kept can be read again
        return {}
