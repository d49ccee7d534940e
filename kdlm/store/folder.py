"""The folder of a capture: what it is of (`capture.json`), the teacher's head where it is needed, and the shards."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError

from kdlm.disk import digest_of_file, write_bytes, write_text
from kdlm.signal import Head, Signal
from kdlm.store.formats import AnyFormat, Format, Raw, Record, Shared
from kdlm.store.sequences import KEY_BYTES, Asked
from kdlm.store.shards import Shard, sealed

VERSION = 1
ABOUT, HEAD, TOKENIZER = "capture.json", "head.safetensors", "tokenizer"
_HALF = np.dtype(">u8")


@dataclass(frozen=True)
class About:
    """What a capture is of. Two captures whose `identity` is equal may share a folder.

    Attributes:
        format: the Section of the format, as plain data.
        teacher: what the teacher is called.
        weights: a digest of its weights.
        tokenizer: fingerprint of the tokenizer that made the ids.
        vocab_size: rows of the teacher's head.
        shared: ids that student and teacher share: the first n, or a list.
        hidden_size: width of the teacher.
        head: checksum, logit scale and softcap of the stored head, or None.
        data: settings and fingerprints of the data of every run that added to it.
    """

    format: dict[str, Any]
    teacher: str
    weights: str
    tokenizer: str
    vocab_size: int
    shared: int | list[int]
    hidden_size: int
    head: dict[str, Any] | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    version: int = VERSION

    @property
    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("data", "teacher", "head")}

    def section(self) -> Format:
        """Return the format. Raises ValueError where this version of kdlm does not know it."""
        try:
            return TypeAdapter(AnyFormat).validate_python(self.format)
        except ValidationError as error:
            raise ValueError(f"format {self.format.get('name')!r} is not one that this kdlm reads: {error}") from error


def read_about(folder: Path) -> About | None:
    """Return what a folder holds; None where there is no capture. Raises ValueError where it cannot be read."""
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        return About(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: is no description of a capture ({error}); restore it, or capture anew") from error


def write_about(folder: Path, about: About) -> None:
    write_text(folder / ABOUT, json.dumps(asdict(about), indent=1))


def save_head(folder: Path, head: Head) -> dict[str, Any]:
    """Write a head beside the shards and return what `capture.json` says of it."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    write_bytes(folder / HEAD, safetensors.torch.save(tensors))
    return {"xxh3": digest_of_file(folder / HEAD), "logit_scale": head.logit_scale, "softcap": head.softcap}


class Store:
    """Reads a capture: any sequence of it by its tokens, any of its positions.

    Opening reads the index of every shard; a data file is mapped when it is first asked for, and its checksum compared
    before that. Raises ValueError naming the file where something is damaged, and where there is no capture.
    """

    def __init__(self, folder: Path):
        found = read_about(folder)
        if found is None:
            raise ValueError(f"{folder}: there is no capture here; make it with `kdlm capture`")
        self.folder, self.about = folder, found
        self.format = found.section()
        self.shards = [Shard(index) for index in sealed(folder)]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def shared(self) -> Shared:
        """The ids that a signal speaks about."""
        return self.about.shared if isinstance(self.about.shared, int) else torch.tensor(self.about.shared)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all data files."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys `[n, 2]` as ascending pairs of 64 bits, and the shard and the place of each."""
        keys = [shard.keys for shard in self.shards] or [np.zeros((0, KEY_BYTES), np.uint8)]
        sizes = [len(shard) for shard in self.shards]
        halves = np.concatenate(keys).view(_HALF).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        which = np.repeat(np.arange(len(sizes)), sizes)
        places = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, int)])
        return halves[order], which[order], places[order]

    def find(self, sequences: Sequence[Asked]) -> list[tuple[Shard, int] | None]:
        """Return shard and place of each sequence, None where the capture has none with these tokens."""
        halves, which, places = self._index
        keys = np.frombuffer(b"".join(s.key for s in sequences), _HALF).reshape(-1, 2)
        found: list[tuple[Shard, int] | None] = []
        for key, at in zip(keys, np.searchsorted(halves[:, 0], keys[:, 0]), strict=True):
            while at < len(halves) and halves[at, 0] == key[0] and halves[at, 1] < key[1]:
                at += 1
            here = at < len(halves) and (halves[at] == key).all()
            found.append((self.shards[which[at]], int(places[at])) if here else None)
        return found

    def lacks(self, sequences: Sequence[Asked]) -> Iterator[tuple[int, str]]:
        """Yield the number of each sequence that cannot be answered, and why."""
        for number, (sequence, found) in enumerate(zip(sequences, self.find(sequences), strict=True)):
            if not len(sequence.positions):
                continue
            if found is None:
                yield number, "no sequence with these tokens"
            elif not np.isin(sequence.positions, found[0].positions(found[1])).all():
                yield number, "some of its positions were not captured"

    def read(self, sequences: Sequence[Asked]) -> Record:
        """Return the record of the asked positions of all sequences, below one another.

        Raises ValueError where one is not in the capture.
        """
        wanted = [sequence for sequence in sequences if len(sequence.positions)]
        raws, chosen, start = [], [], 0
        for sequence, found in zip(wanted, self.find(wanted), strict=True):
            if found is None:
                raise ValueError(f"{self.folder}: no sequence with these {sequence.length} tokens was captured")
            shard, place = found
            raws.append(self._raw(shard, place))
            kept = shard.positions(place)
            chosen.append(start + self._places(kept, sequence))
            start += len(kept)
        if not raws:
            if not len(self):
                raise ValueError(f"{self.folder}: the capture is empty; make it with `kdlm capture`")
            raws, chosen = [self._raw(self.shards[0], 0)], [np.zeros(0, np.int64)]
        record, rows = self.format.unpack(raws), np.concatenate(chosen)
        if wanted and len(rows) == start:
            return record
        return {name: values[torch.from_numpy(rows)] for name, values in record.items()}

    def _raw(self, shard: Shard, place: int) -> Raw:
        try:
            return self.format.raw(*shard.columns(place))
        except ValueError as error:
            raise ValueError(f"{shard.path}: sequence {place}: {error}") from error

    def _places(self, kept: np.ndarray, sequence: Asked) -> np.ndarray:
        """Return where the asked positions stand among those that are kept."""
        if np.array_equal(kept, sequence.positions):
            return np.arange(len(kept))
        at = np.searchsorted(kept, sequence.positions).clip(max=len(kept) - 1)
        if not np.array_equal(kept[at], sequence.positions):
            raise ValueError(f"{self.folder}: positions of a sequence of {sequence.length} tokens were not captured")
        return at

    def head(self) -> Head | None:
        """Return the teacher's head, where the format needs one. Raises ValueError where it is damaged."""
        about = self.about.head
        if about is None:
            return None
        path = self.folder / HEAD
        if not path.is_file() or digest_of_file(path) != about["xxh3"]:
            raise ValueError(f"{path}: is missing or damaged (its checksum differs); capture into a new folder")
        tensors = safetensors.torch.load_file(path)
        return Head(tensors["weight"], tensors.get("bias"), about["logit_scale"], about["softcap"])

    def signal(self, record: Mapping[str, Any], head: Head | None) -> Signal:
        """Return a record as the losses get it."""
        return self.format.signal(dict(record), head)
