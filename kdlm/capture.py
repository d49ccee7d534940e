"""`kdlm capture`: one pass of a teacher over the data, its signals written to disk.

The sequences are cut into units, each of which becomes one shard. Whoever finds a unit that is neither sealed nor
locked makes it, so any number of processes can work on one capture, join late and be killed: `torchrun`, or several
terminals. A unit is named by what is in it, and its random draws are seeded by its name: who made it leaves no trace.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers.utils import logging as hf_logging

from kdlm.data import Collator, Data, DataSection
from kdlm.data.load import pad_id
from kdlm.data.vocabulary import shared_vocabulary
from kdlm.disk import flush
from kdlm.losses import kept_rows
from kdlm.opening import loaded
from kdlm.recipe import Recipe, across
from kdlm.sandbox.progress import console
from kdlm.signal import IGNORE_INDEX, Head, Hidden, Rows, Signal
from kdlm.store import (
    INDEX,
    TOKENIZER,
    About,
    Asked,
    ShardWriter,
    Store,
    TopKFormat,
    Unit,
    plan,
    read_about,
    save_head,
    write_about,
)
from kdlm.store.formats import Columns, Format
from kdlm.teachers import CachedTeacherSection

Work = tuple[np.ndarray, Asked]
"""Token ids of a sequence, and what is asked of it."""

_WAIT = 5.0
"""Seconds that a process waits for another's unit before it looks again whether that one lives."""


def capture(recipe: Recipe) -> Path:
    """Write the signals of the recipe's cached teacher for all of its data, and return the folder.

    For a method across tokenizers they are of the teacher's own reading of the text.
    Goes on where a killed capture stopped, adds what data have been added, and shares the work with other processes.
    Raises ValueError where the recipe names nothing to capture, or the folder holds another capture.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    section = section_of(recipe)
    assert section.of is not None
    if not isinstance(recipe.data, DataSection):
        raise ValueError(f"data: signals are captured of text, not of {recipe.data.name}: use the model as the teacher")
    tokenizer, data = loaded(recipe)
    if "rejected" in (data.train.column_names or ()):
        raise ValueError("data: signals are captured of sequences, and preferences are two in one row")
    print(data.report)
    splits = [split for split in (data.train, data.eval) if split is not None]
    width = section.of.config().get_text_config().hidden_size
    units = plan(splits, max(1, int(section.shard_mb * 2**20 / section.format.row_bytes(width))))
    fresh = read_about(section.path) is None
    known = None if fresh else Store(section.path)
    left = [
        unit
        for unit in units
        if not is_sealed(section.path, unit) and (known is None or _lacking(known, unit.read(splits)))
    ]
    if left or fresh:
        model: Any = section.of.build(_device(recipe))
        theirs = section.of.tokenizer()
        shared = compared(recipe, tokenizer, theirs, model)
        about = described(section, model, shared if isinstance(shared, int) else shared.tolist(), data)
        enter(section.path, about, model, theirs)
        pad = pad_id(theirs if across(recipe) else tokenizer)
        observe = Observer(model, section.format, shared, pad, section.batch_tokens)
        try:
            _work(left, splits, known, section.path, observe)
        finally:
            if hasattr(model, "close"):
                model.close()
    store = Store(section.path)
    print(
        f"{section.path}: {store.rows:,} tokens of {len(store):,} sequences in {len(store.shards)} shards, "
        f"{store.bytes / 2**20:,.1f} MiB, {store.bytes / max(1, store.rows):.1f} bytes a token"
    )
    return section.path


def section_of(recipe: Recipe) -> CachedTeacherSection:
    """Return what is to be captured. Raises ValueError where the recipe does not say, or cannot work."""
    section = recipe.teacher
    if not isinstance(section, CachedTeacherSection):
        raise ValueError("teacher: kdlm capture needs `teacher: {name: cached, path: FOLDER, of: {...}}`")
    if section.of is None:
        raise ValueError("teacher.of: missing; name the model to capture, e.g. {name: local, path: Qwen/Qwen3-8B}")
    if recipe.data.streaming:
        raise ValueError("data.streaming: a stream may never end and cannot be captured; set streaming: false")
    return section


def compared(recipe: Recipe, tokenizer: Any, theirs: Any, model: Any) -> int | torch.Tensor:
    """Return the ids whose probabilities are kept: what both tokenizers share; all, where each reads by itself.

    Raises ValueError where token by token nothing can be compared.
    """
    if across(recipe):
        return model.vocab_size
    student: Any = recipe.student  # a language model: the data are text
    ours = student.config().get_text_config().vocab_size
    return shared_vocabulary(tokenizer, theirs, ours, model.vocab_size).require()


def _device(recipe: Recipe) -> torch.device:
    cpu = recipe.training.model_dump().get("use_cpu") or not torch.cuda.is_available()
    return torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


# The folder


def described(section: CachedTeacherSection, model: Any, shared: int | list[int], data: Data) -> About:
    """Return what `capture.json` is to say."""
    assert section.of is not None
    count = shared if isinstance(shared, int) else len(shared)
    if isinstance(section.format, TopKFormat) and section.format.k > count:
        raise ValueError(f"teacher.format.k: {section.format.k} of {count} shared ids; take fewer")
    return About(
        format=section.format.model_dump(mode="json"),
        teacher=section.of.describe(),
        weights=model.fingerprint(),
        tokenizer=data.made_with["tokenizer"],
        vocab_size=model.vocab_size,
        shared=shared,
        hidden_size=section.of.config().get_text_config().hidden_size,
        data=[{"made_with": data.made_with, "fingerprints": data.fingerprints}],
    )


def enter(folder: Path, about: About, model: Any, tokenizer: Any) -> None:
    """Make the folder, or add to what it says; ValueError where it holds a capture of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".capture.lock"):
        found = read_about(folder)
        if found is None:
            if not (folder / TOKENIZER).is_dir():
                _save_tokenizer(folder, tokenizer)
            head = _head(model) if about.format["name"] == "hidden" else None
            write_about(folder, replace(about, head=None if head is None else save_head(folder, head)))
            return
        before, now = found.identity, about.identity
        if changed := [key for key in now if now[key] != before.get(key)]:
            said = "; ".join(f"{key} was {_short(before.get(key))} and is {_short(now[key])}" for key in changed)
            raise ValueError(f"teacher.path: {folder} holds another capture: {said}; choose another folder")
        if about.data[0] not in found.data:
            write_about(folder, replace(found, data=[*found.data, *about.data]))


def _head(model: Any) -> Head:
    """Ask for no rows at all: what comes with them is the head."""
    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "labels": torch.full((1, 1), IGNORE_INDEX)}
    signal = model(batch, kept_rows(batch["labels"]))
    if not isinstance(signal, Hidden):
        raise ValueError("teacher.format: hidden cannot be had: this teacher's logits are not head(hidden); use top_k")
    return signal.head


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    incoming = folder / f".{TOKENIZER}.tmp"
    shutil.rmtree(incoming, ignore_errors=True)
    tokenizer.save_pretrained(incoming)
    flush(incoming)
    os.replace(incoming, folder / TOKENIZER)


def _short(value: Any) -> str:
    said = str(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


# The work


def is_sealed(folder: Path, unit: Unit) -> bool:
    """Whether the unit's shard is whole."""
    return (folder / f"{unit.name}{INDEX}").is_file()


def _lacking(known: Store | None, sequences: list[Work]) -> list[Work]:
    """Return those that the shards of earlier runs do not hold."""
    if known is None:
        return sequences
    return [sequences[number] for number, _ in known.lacks([sequence for _, sequence in sequences])]


def _work(units: list[Unit], splits: list[Any], known: Store | None, folder: Path, observe: "Observer") -> None:
    """Make every unit that nobody else makes; return when all are sealed."""
    written, own, began = 0, 0, time.monotonic()
    with console(f"capture into {folder}", sum(unit.rows for unit in units)) as advance:
        for unit, ours in _claimed(units, folder):
            if not ours:
                advance(unit.rows, "")
                continue
            written += _make(unit, _lacking(known, unit.read(splits)), folder, observe)
            own += unit.rows
            pace = own / (time.monotonic() - began)
            todo = sum(other.rows for other in units if not is_sealed(folder, other))
            left = timedelta(seconds=round(todo / pace))
            advance(unit.rows, f"{pace:,.0f} tokens/s, {written / own:.1f} bytes a token, eta {left}")


def _claimed(units: list[Unit], folder: Path) -> Iterator[tuple[Unit, bool]]:
    """Yield each unit once: locked, for us to make, or False where it is sealed already."""
    waiting, patience = list(units), 0.0
    while waiting:
        busy = []
        for unit in waiting:
            try:
                with FileLock(folder / f".{unit.name}.lock", timeout=patience) as lock:
                    sealed = is_sealed(folder, unit)
                    yield unit, not sealed
                    Path(lock.lock_file).unlink(missing_ok=True)
            except Timeout:
                busy.append(unit)
        waiting, patience = busy, _WAIT


def _make(unit: Unit, sequences: list[Work], folder: Path, observe: "Observer") -> int:
    """Make a shard of these sequences of a unit; return its bytes."""
    generator = torch.Generator(observe.device).manual_seed(int(unit.name[:15], 16) ^ observe.seed)
    writer = ShardWriter()
    for sequence, columns in observe(sequences, generator):
        writer.add(sequence, columns)
    return writer.seal(folder, unit.name)


class Observer:
    """Asks a teacher, and keeps what the format keeps.

    Args:
        model: a teacher; one behind a server is asked one batch ahead.
        shared: the ids that have any probability.
        pad: the id to pad with.
        batch_tokens: most tokens, padding among them, that the model reads at once.
    """

    def __init__(self, model: Any, format: Format, shared: Any, pad: int, batch_tokens: int):
        self.model, self.format, self.shared, self.batch_tokens = model, format, shared, batch_tokens
        self.collate = Collator(pad)
        self.device = getattr(model, "device", torch.device("cpu"))
        self.seed = getattr(format, "seed", 0)

    def __call__(self, sequences: list[Work], generator: torch.Generator) -> Iterator[tuple[Asked, Columns]]:
        """Yield the columns of each sequence; they come with the longest first."""
        cuts = self._cut(sequences)
        ahead = self._asked(cuts[0]) if cuts else {}
        for some, following in zip_longest(cuts, cuts[1:]):
            batch, ahead = ahead, self._asked(following) if following is not None else {}
            rows = kept_rows(batch["labels"])
            asked = [sequence for _, sequence in some]
            signal = self.model(batch, rows)
            columns = self._columns(signal, rows, [len(one.positions) for one in asked], generator)
            yield from zip(asked, columns, strict=True)

    def _cut(self, sequences: list[Work]) -> list[list[Work]]:
        """Cut sequences, the longest first, into batches."""
        cuts, start = [], 0
        while start < len(sequences):
            size = max(1, self.batch_tokens // sequences[start][1].length)
            cuts.append(sequences[start : start + size])
            start += size
        return cuts

    def _asked(self, sequences: list[Work]) -> dict[str, Any]:
        made = self.collate([_row(*one) for one in sequences])
        batch: dict[str, Any] = {key: value.to(self.device) for key, value in made.items()}
        return batch | ({"teacher": self.model.prefetch(batch)} if hasattr(self.model, "prefetch") else {})

    def _columns(self, signal: Signal, rows: Rows, sizes: list[int], generator: torch.Generator) -> list[Columns]:
        record = self.format.observe(signal, self.shared, rows.labels, generator)
        split = {name: values.split(sizes) for name, values in record.items()}
        return [self.format.pack({name: parts[i] for name, parts in split.items()}) for i in range(len(sizes))]


def _row(ids: np.ndarray, sequence: Asked) -> dict[str, Any]:
    """Return a row whose kept positions are those that are asked."""
    labels = np.full(len(ids), IGNORE_INDEX)
    labels[sequence.positions + 1] = ids[sequence.positions + 1]
    return {"input_ids": ids, "labels": labels}
