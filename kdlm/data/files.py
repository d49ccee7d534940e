"""Readers of files: one generator per format, yielding (`file:line`, values) for every row.

A file that is not what its format says ends with a ValueError that names the line; a row that is well-formed but of
no use is for the caller to judge.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = tuple[str, dict[str, Any]]
"""Where a row is (`file:line`), and its values by column."""

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
}


def first_columns(form: str, files: list[Path], sample_by: str) -> list[str] | None:
    """Return the columns of the first row of these files, or None when they have no rows."""
    for file in files:
        if form == "parquet":
            table = _parquet(file)
            if table.metadata.num_rows:
                return table.schema_arrow.names
            continue
        for _, row in READERS[form](file, [], sample_by):
            return list(row)
    return None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines; a byte order mark is dropped."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            yield from enumerate(stream, 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason}): convert it, e.g. with iconv") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{place}: a row is a JSON object such as {{"text": ...}}, not {type(value).__name__}')
    return value


def read_jsonl(file: Path, columns: list[str], sample_by: str) -> Iterator[Row]:
    """Yield one row per line that is not blank."""
    for number, line in _lines(file):
        if line.strip():
            place = f"{file}:{number}"
            try:
                value = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON at column {error.colno}: {error.msg}") from error
            yield place, _object(value, place)


def read_json(file: Path, columns: list[str], sample_by: str) -> Iterator[Row]:
    """Yield the elements of the file's one JSON list."""
    try:
        values = json.loads("".join(line for _, line in _lines(file)) or "[]")
    except json.JSONDecodeError as error:
        mend = "; one object per line is `format: jsonl`" if error.msg == "Extra data" else ""
        raise ValueError(f"{file}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}{mend}") from error
    if not isinstance(values, list):
        raise ValueError(f"{file}:1: a json file of rows is a list of objects, not {type(values).__name__}")
    for number, value in enumerate(values, 1):
        place = f"{file} row {number}"
        yield place, _object(value, place)


def read_csv(file: Path, columns: list[str], sample_by: str) -> Iterator[Row]:
    """Yield the rows under the header line, all values as strings. A `.tsv` is divided by tabs."""
    csv.field_size_limit(2**31 - 1)  # a document in a field easily passes the default of 128 KiB
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at  # csv's own count is of the lines before the one that it fails on
        for number, line in _lines(file):
            at = number
            yield line

    reader = csv.DictReader(lines(), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            place = f"{file}:{at}"
            if None in row:
                raise ValueError(f"{place}: more fields than the header has: quote fields that contain a separator")
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{file}:{at}: not valid CSV: {error}") from error


def read_text(file: Path, columns: list[str], sample_by: str) -> Iterator[Row]:
    """Yield lines, paragraphs or the whole file as column `text`; blank ones are no rows."""
    start, kept = 1, []
    for number, line in _lines(file):
        if sample_by == "line" and line.strip():
            yield f"{file}:{number}", {"text": line.rstrip("\r\n")}
        elif sample_by == "paragraph" and not line.strip():
            if kept:
                yield f"{file}:{start}", {"text": "".join(kept).rstrip()}
            start, kept = number + 1, []
        elif sample_by != "line":
            kept.append(line)
    if "".join(kept).strip():
        yield f"{file}:{start}", {"text": "".join(kept).rstrip() if sample_by == "paragraph" else "".join(kept)}


def _parquet(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from error


def read_parquet(file: Path, columns: list[str], sample_by: str) -> Iterator[Row]:
    """Yield the rows of the table, with the wanted columns only (all when none are named)."""
    table = _parquet(file)
    wanted = [name for name in columns if name in table.schema_arrow.names] or None
    number = 0
    try:
        for batch in table.iter_batches(batch_size=1000, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: broken after row {number}: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path, list[str], str], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "text": read_text,
    "parquet": read_parquet,
}
