"""Sources: from what a recipe names to rows, each with the place it came from.

Files are read here, so that a broken line is named with its file and line and one odd row does not change the type of
a column; folders and hub ids go through `datasets.load_dataset`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any

import datasets
from pydantic import ValidationError

from kdlm.data.files import READERS, SUFFIXES, Row, first_columns
from kdlm.data.sections import Source
from kdlm.sandbox import SandboxData

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Opened:
    """A source that was found.

    Attributes:
        name: how reports call it.
        columns: the columns of its first row.
        read: called with the wanted columns, iterates over the rows.
        digest: a hash of its content; of names, sizes and times when called with `whole=False`.
    """

    name: str
    columns: list[str]
    read: Callable[[list[str]], Iterator[Row]]
    digest: Callable[[bool], str]


def open_source(source: Source, *, stream: bool = False) -> Opened:
    """Find a source and look at its columns.

    `stream` reads a hub data set over the network as it is used, instead of downloading it first.
    Raises ValueError when there is no such source, it is empty or its format is unknown.
    """
    path = Path(source.path).expanduser()
    if source.path.startswith("sandbox:"):
        return _open_files(source, [_sandbox_file(source.path)])
    if path.is_dir():
        _refuse(source, "a folder", revision=source.revision, format=source.format != "auto")
        return _opened_dataset(source, _load_folder(source, path), lambda whole: _digest_files(_files_in(path), whole))
    if path.is_file():
        return _open_files(source, [path])
    if glob(str(path)):
        return _open_files(source, sorted(Path(name) for name in glob(str(path)) if Path(name).is_file()))
    if HUB_ID.fullmatch(source.path) and path.suffix not in SUFFIXES and not source.path.startswith("."):
        _refuse(source, "a hub data set", format=source.format != "auto")
        loaded = _load(source, source.path, revision=source.revision, streaming=stream)
        return _opened_dataset(source, loaded, lambda whole: _digest_hub(source, loaded))
    raise ValueError(f"data source {source.path!r}: no such file or folder{_near(path)}")


def _sandbox_file(path: str) -> Path:
    """Return the file that `sandbox:code/train` names, made at its first use."""
    data, _, file = path.removeprefix("sandbox:").partition("/")
    try:
        return SandboxData.model_validate({"data": data, "file": file or "train"}).resolve()
    except ValidationError as error:
        raise ValueError(f"data source {path!r}: {error.errors()[0]['msg']} (sandbox:DATA/FILE)") from error


def _refuse(source: Source, kind: str, **given: Any) -> None:
    for key, value in given.items():
        if value:
            raise ValueError(f"data source {source.path!r}: `{key}` means nothing for {kind}: remove it")


def _near(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return f", did you mean {str(path.with_name(near[0]))!r}?" if near else f" (looked in {Path.cwd()})"


# files


def _open_files(source: Source, files: list[Path]) -> Opened:
    _refuse(source, "a file", subset=source.subset, split=source.split, revision=source.revision)
    formats = {_format_of(source, file) for file in files}
    if len(formats) != 1:
        raise ValueError(f"data source {source.path!r}: files of several formats ({', '.join(sorted(formats))})")
    form = formats.pop()
    _refuse(source, f"{form} files", sample_by=form != "text" and source.sample_by != "line")

    def read(columns: list[str]) -> Iterator[Row]:
        for file in files:
            yield from READERS[form](file, columns, source.sample_by)

    columns = first_columns(form, files, source.sample_by)
    if columns is None:
        raise ValueError(f"data source {source.path!r}: no rows in it")
    return Opened(source.path, columns, read, lambda whole: _digest_files(files, whole))


def _format_of(source: Source, file: Path) -> str:
    if source.format != "auto":
        return source.format
    if file.suffix not in SUFFIXES:
        known = ", ".join(sorted(SUFFIXES))
        raise ValueError(
            f"data source {str(file)!r}: unknown format {file.suffix!r}: rename it to one of {known}, or say `format`"
        )
    return SUFFIXES[file.suffix]


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def _digest_files(files: list[Path], whole: bool) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"\0{file.name}\0".encode())
        if whole:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            stat = os.stat(file)
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


# folders and the hub


def _load_folder(source: Source, folder: Path) -> datasets.Dataset:
    if (folder / "state.json").is_file():  # written by Dataset.save_to_disk
        _refuse(source, "a saved data set", subset=source.subset, split=source.split)
        return datasets.Dataset.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():  # written by DatasetDict.save_to_disk
        splits = datasets.DatasetDict.load_from_disk(str(folder))
        split = source.split or "train"
        if split not in splits:
            raise ValueError(f"data source {source.path!r}: no split {split!r}, it has {', '.join(map(repr, splits))}")
        return splits[split]
    try:
        return _load(source, str(folder), streaming=False)
    except ValueError:
        for file in _files_in(folder):  # a line that is not JSON is the likeliest cause: name it
            if SUFFIXES.get(file.suffix) in ("jsonl", "json"):
                for _ in READERS[SUFFIXES[file.suffix]](file, [], "line"):
                    pass
        raise


def _load(source: Source, path: str, **options: Any) -> Any:
    try:
        return datasets.load_dataset(path, source.subset, split=source.split or "train", **options)
    except Exception as error:  # the loader lets through whatever its many backends raise
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        here = "" if os.path.isdir(path) else "neither a file or folder here, nor loadable from the hub: "
        asked = "".join(
            f", {key} {value!r}" for key in ("subset", "split", "revision") if (value := getattr(source, key))
        )
        raise ValueError(f"data source {source.path!r}{asked}: {here}{reason}") from error


def _opened_dataset(source: Source, loaded: Any, digest: Callable[[bool], str]) -> Opened:
    columns = loaded.column_names
    first = next(iter(loaded.take(1)), None)
    if first is None:
        raise ValueError(f"data source {source.path!r}: no rows in split {source.split or 'train'!r}")

    def read(columns: list[str]) -> Iterator[Row]:
        for number, row in enumerate(loaded.select_columns(columns), 1):
            yield f"{source.path} row {number}", row

    return Opened(source.path, columns or list(first), read, digest)


def _digest_hub(source: Source, loaded: Any) -> str:
    # `datasets` derives a stored data set's fingerprint from the commit and the files it was built from
    version = getattr(loaded, "_fingerprint", None) or f"{source.revision} {loaded.info.version}"
    return hashlib.sha256(f"{source.path} {source.subset} {source.split} {version}".encode()).hexdigest()
