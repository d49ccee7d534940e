"""Folders that are whole or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from kdlm.disk import flush, flush_names


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `output` when everything is in it and on disk.

    What fails leaves nothing; what is killed leaves a hidden folder beside it, which the next one removes. Raises
    ValueError where there is something at `output` already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: there already; give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial"
    rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        flush(partial)
    except BaseException:
        rmtree(partial, ignore_errors=True)
        raise
    if output.is_dir():
        output.rmdir()
    partial.rename(output)
    flush_names(output.parent)
