"""Where kdlm keeps what it makes, and how it is written so that a kill or a power cut leaves nothing half-written."""

import os
from pathlib import Path

import xxhash


def cache_folder(room: str, given: str | Path | None = None) -> Path:
    """Return a room's part of the cache: below `given`, else $KDLM_CACHE, else ~/.cache/kdlm."""
    return Path(given or os.environ.get("KDLM_CACHE") or "~/.cache/kdlm").expanduser().resolve() / room


def write_text(path: Path, text: str) -> None:
    """Write a file so that what is there is the old content or the new one, never a part; makes its folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that what is there is the old content or the new one, never a part; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_of_file(path: Path) -> str:
    """Return the xxh3 checksum of a file: fast, and against accidents only."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def flush(folder: Path) -> None:
    """Bring every file of a folder to disk, and the names in it: what must come before a rename that publishes it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            flush_names(path)
    flush_names(folder)


def flush_names(folder: Path) -> None:
    """A rename is on disk when the folder that holds the name is; Windows has no such call and no such need."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
