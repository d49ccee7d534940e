"""Cache: tables of tokens on disk, each under the fingerprint of everything it was made from.

A table is written into a folder of a temporary name, flushed and renamed, so a finished folder is a whole one. One
lock per fingerprint lets one process build while others wait; it dies with its process, and the next to hold it
clears away what was left. Content is verified against its checksum on opening; a damaged table is built again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from kdlm.data.forms import CONTEXTS
from kdlm.disk import flush, flush_names

log = logging.getLogger(__name__)

CODE_VERSION = 1
"""Part of every fingerprint: raise it with every change to what rows become."""

BATCH = 1000
"""Rows of one Arrow record batch."""

TOKENS = pa.list_(pa.int32())
SEQUENCES = pa.schema({"input_ids": TOKENS, "labels": TOKENS, "length": pa.int32(), "key": pa.int64()})
BESIDE = {
    "domain": pa.int64(),
    "reference": pa.string(),
    "weight": pa.float32(),
    "score": pa.float64(),
    **dict.fromkeys(CONTEXTS, pa.string()),
}
"""What a sequence carries beside its tokens where its source says it of every row."""
PACKED = pa.schema(
    {
        "input_ids": TOKENS,
        "labels": TOKENS,
        "length": pa.int32(),
        "seq_lengths": TOKENS,
        "index": pa.list_(pa.int64()),
    }
)


def fingerprint(*parts: Any) -> str:
    """Return the hash of plain values, as 32 hexadecimal digits."""
    text = json.dumps([CODE_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True) -> str:
    """Return the hash of all of a tokenizer that decides which tokens a row becomes, with or without its template."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer  # None for slow ones only
        state = json.loads(backend.to_str())
        state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}  # a call's own
    else:
        state = tokenizer.get_vocab()
    sample = tokenizer("a")["input_ids"]  # with the tokens that a wrapper adds of its own accord
    template = tokenizer.chat_template if chat_template else None
    return fingerprint(state, template, tokenizer.special_tokens_map, sample)


def cached_table(
    root: Path, name: str, schema: pa.Schema, rows: Iterator[dict[str, Any]], about: Callable[[], dict[str, Any]]
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Return the table `name`, and what is known about it; build it from `rows` unless it is there.

    `rows` is consumed only to build; `about` is called when they are used up, and is stored with the table. What
    either raises is passed on, and leaves nothing behind.
    """
    folder = root / name
    if (found := _open(folder)) is not None:
        return found
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if (found := _open(folder)) is not None:  # built while waiting for the lock
            return found
        shutil.rmtree(folder, ignore_errors=True)
        unfinished = root / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            _write(unfinished, schema, rows, about)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        flush_names(root)
    found = _open(folder)
    assert found is not None, f"{folder} was just written"
    return found


def _write(folder: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]], about: Callable[[], dict]) -> None:
    table = folder / "data.arrow"
    with table.open("wb") as stream:
        with pa.ipc.new_stream(stream, schema) as writer:
            batch: list[dict[str, Any]] = []
            for row in rows:
                batch.append(row)
                if len(batch) == BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                    batch = []
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    (folder / "about.json").write_text(json.dumps({"sha256": _digest(table), **about()}, indent=1), encoding="utf-8")
    flush(folder)


def _open(folder: Path) -> tuple[datasets.Dataset, dict[str, Any]] | None:
    """Return a finished table; None when there is none, or it is damaged."""
    table = folder / "data.arrow"
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if _digest(table) == about["sha256"]:
            return datasets.Dataset.from_file(str(table)), about
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError):
        pass
    log.warning("%s is damaged and is built again", folder)
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
