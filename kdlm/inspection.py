"""Inspection: a finished run token by token, on a few of its texts: what is behind the figures, for people to read."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kdlm.data import DataSection
from kdlm.data.load import text_collator
from kdlm.disk import digest_of_file, write_text
from kdlm.estimates import finite
from kdlm.finished_run import FinishedRun, open_run
from kdlm.losses import Likeliest, likeliest
from kdlm.measuring import Reader, Reading, Tally
from kdlm.measuring.measure import readings
from kdlm.models import evaluating

VERSION = 1
"""Part of what a kept inspection is known by: raise it when what is recorded changes."""
SHOWN = ("cross_entropy", "kl_to_teacher", "reverse_kl_to_teacher")
"""Measures that are recorded of each token."""


def inspect_run(path: Path, texts: int = 8, top: int = 5, *, length: int = 512) -> dict[str, Any]:
    """Return what student and teacher say about each token of a few texts of a run, and the figures of these texts.

    The texts are evaluation rows, evenly spread over the split; training rows where there are none. It is kept as
    `inspection.json` in the run folder, and made again when the recipe, the student or what is asked for changed.

    Args:
        path: folder of a finished run.
        texts: how many, at most.
        top: probable tokens of each side that are named.
        length: tokens of a text that are looked at, from its beginning on.

    Returns:
        `student`, `teacher` (None without one), `texts`, each with `place` and `tokens`: `text`, `kept` (whether a loss
        counts it), and of those that are kept the measures in nats, `student` and `teacher`: `[[text, probability]]`.
        `measured` is `kdlm.measuring.measure` of the same tokens: the means of theirs.

    Raises ValueError where there is no finished run, or one whose student is no language model.
    """
    if not (path / "recipe.yaml").is_file() or not (path / "student").is_dir():
        raise ValueError(f"{path}: no finished run, there is no recipe.yaml with a folder student beside it")
    kept, made_of = path / "inspection.json", {"asked": [texts, top, length], "content": _content(path)}
    if (found := _read(kept)).get("made_of") == made_of:
        return found
    run = open_run(path)
    try:
        found = {**_inspected(run, texts, top, length), "made_of": made_of}
    finally:
        run.close()
    write_text(kept, json.dumps(found, allow_nan=False))
    return found


def _inspected(run: FinishedRun, texts: int, top: int, length: int) -> dict[str, Any]:
    reader = Reader(
        run.student,
        run.teacher,
        vocab=run.vocab,
        tokenizer=run.tokenizer,
        their_tokenizer=run.their_tokenizer,
    )
    split = "train" if run.data.eval is None else "eval"
    rows = _sequences(run.data.train if run.data.eval is None else run.data.eval, texts)
    packed = getattr(run.recipe.data, "packing", "none") == "pack" and run.their_tokenizer is None
    collate = text_collator("padding_free", run.tokenizer) if packed else run.data.collator
    documents, tally, shown = run.data.documents.get(split), Tally(), []
    with evaluating(*reader.modules):
        for batch, whole in readings(reader, rows, collate=collate, batch_size=1):
            reading = _beginning(whole, length) if run.their_tokenizer is None else whole
            index = batch["index"].tolist() if "index" in batch else [len(shown)]
            tally.add(reading, index if documents is None else [int(documents[number]) for number in index])
            tokens = _tokens(run, batch, reading, top)
            place = f"{_source(run, split)}, sequence {index[0]}"
            shown.append({"place": place, "tokens": tokens[:length]})
    return {
        "student": str(run.recipe.run_dir / "student"),
        "teacher": None if run.recipe.teacher is None else _named(run.recipe.teacher),
        "texts": shown,
        "measured": tally.measured(reader.notes),
    }


def _beginning(reading: Reading, length: int) -> Reading:
    """Return what was measured of the first `length` tokens of a batch that is one sequence."""
    return reading.only(reading.rows.index < length - 1)


def _tokens(run: FinishedRun, batch: dict[str, Any], reading: Reading, top: int) -> list[dict[str, Any]]:
    """Return the record of every token of a batch of one sequence."""
    decode = run.tokenizer.decode
    tokens: list[dict[str, Any]] = [
        {"text": decode([token]), "kept": False} for token in batch["input_ids"].flatten().tolist()
    ]
    ours, theirs = likeliest(*reading.signals, top, vocab=run.vocab)
    measures = {name: reading.values[name].tolist() for name in SHOWN if name in reading.values}
    for row, before in enumerate(reading.rows.index.tolist()):
        token = tokens[before + 1]
        token["kept"] = True
        token |= {name: finite(values[row]) for name, values in measures.items()}
        for side, said in (("student", ours), ("teacher", theirs)):
            if said is not None:
                token[side] = _named_tokens(said, row, decode)
    return tokens


def _named_tokens(said: Likeliest, row: int, decode: Any) -> list[list[Any]]:
    ids, probabilities = said.ids[row].tolist(), said.probabilities[row].tolist()
    return [[decode([token]), float(f"{p:.4g}")] for token, p in zip(ids, probabilities, strict=True)]


def _sequences(rows: Any, count: int) -> list[dict[str, Any]]:
    """Return so many sequences, evenly spread over stored rows, the first of a stream; each as a row of its own."""
    if hasattr(rows, "__len__"):
        some: Iterable[dict[str, Any]] = (rows[number] for number in _spread(len(rows), count))
    else:
        some = islice(iter(rows), count)
    found = [one for row in some for one in _apart(row)]
    return [found[number] for number in _spread(len(found), count)]


def _spread(length: int, count: int) -> list[int]:
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _apart(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sequences of a packed row, or of a preference; one of two readings stays as it is."""
    if "seq_lengths" not in row or "chunks" in row:
        yield row
        return
    at, count = 0, len(row["seq_lengths"])
    # the two of a preference have one number
    told = {name: np.broadcast_to(row[name], count) for name in ("index", "domain") if name in row}
    for number, size in enumerate(row["seq_lengths"]):
        part = slice(at, at := at + int(size))
        beside = {name: values[number] for name, values in told.items()}
        yield {"input_ids": row["input_ids"][part], "labels": row["labels"][part], "length": int(size), **beside}


def _source(run: FinishedRun, split: str) -> str:
    """Return what the rows of a split are of, in a few words."""
    section = run.recipe.data
    if not isinstance(section, DataSection):
        return split
    sources = section.eval if split == "eval" and section.eval else section.train
    held_out = " (held out)" if split == "eval" and not section.eval else ""
    return f"{', '.join(source.path for source in sources)}{held_out}"


def _named(section: Any) -> str:
    return section.describe() if hasattr(section, "describe") else str(section.name)


def _content(path: Path) -> dict[str, Any]:
    """Return checksums of all that an inspection of a run folder depends on."""
    files = sorted(file for file in (path / "student").rglob("*") if file.is_file() and file.name != "README.md")
    named = {str(file.relative_to(path)): digest_of_file(file) for file in (path / "recipe.yaml", *files)}
    return {"version": VERSION, "files": named}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
