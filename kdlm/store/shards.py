"""Shards: two files each, a data file, and an index file whose presence says that the data file is whole.

Both are safetensors. The index has the keys and rows of the shard's sequences, the checksum of the data file and one of
itself. It is written last, so a kill leaves either a whole shard or nothing that anybody reads.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdlm.disk import digest_of_file, write_bytes
from kdlm.store.formats import Columns
from kdlm.store.sequences import KEY_BYTES, Asked

DATA, INDEX = ".safetensors", ".index.safetensors"


class ShardWriter:
    """Collects sequences and writes them as one shard."""

    def __init__(self) -> None:
        self.sequences: list[Asked] = []
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, sequence: Asked, columns: Columns) -> None:
        """Take in the columns of a sequence's rows."""
        self.sequences.append(sequence)
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    def seal(self, folder: Path, name: str) -> int:
        """Write data and index; return the bytes of both."""
        data = safetensors.torch.save({key: torch.cat(values) for key, values in self._columns.items()})
        packed = self._columns.get("packed")
        runs = [_runs(sequence.positions) for sequence in self.sequences]
        index = {
            "keys": torch.frombuffer(bytearray(b"".join(s.key for s in self.sequences)), dtype=torch.uint8),
            "lengths": torch.tensor([s.length for s in self.sequences]),
            "row_ends": torch.tensor([len(s.positions) for s in self.sequences]).cumsum(0),
            "runs": torch.from_numpy(np.concatenate(runs)),
            "run_ends": torch.tensor([len(r) for r in runs]).cumsum(0),
        }
        if packed is not None:
            index["packed_ends"] = torch.tensor([len(values) for values in packed]).cumsum(0)
        about = {"data": xxhash.xxh3_64_hexdigest(data), "bytes": str(len(data))}
        about["index"] = _digest(index, about)
        sealed = safetensors.torch.save(index, {"kdlm": json.dumps(about)})  # one entry: several have no fixed order
        write_bytes(folder / f"{name}{DATA}", data)
        write_bytes(folder / f"{name}{INDEX}", sealed)
        return len(data) + len(sealed)


class Shard:
    """A sealed shard: its index in memory, its data mapped when it is first read, after its checksum was found right.

    Raises ValueError naming the file where something does not fit.
    """

    def __init__(self, index: Path):
        self.path = index.with_name(index.name.removesuffix(INDEX) + DATA)
        try:
            with safe_open(index, framework="pt") as opened:
                self._about = json.loads((opened.metadata() or {}).get("kdlm", "{}"))
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{index}: {MENDED.format(what=f'cannot be read ({error})')}") from error
        if _digest(tensors, self._about) != self._about.get("index"):
            raise ValueError(f"{index}: {MENDED.format(what='is damaged (its checksum differs)')}")
        self.keys = tensors["keys"].numpy().reshape(-1, KEY_BYTES)
        self._rows = _bounds(tensors["row_ends"])
        self._runs, self._run_bounds = tensors["runs"].numpy(), _bounds(tensors["run_ends"])
        self._packed = _bounds(tensors["packed_ends"]) if "packed_ends" in tensors else None
        self._opened: Any = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def rows(self) -> int:
        return int(self._rows[-1])

    @property
    def bytes(self) -> int:
        """Bytes of the data file."""
        return int(self._about["bytes"])

    def positions(self, place: int) -> np.ndarray:
        """Return the positions that are kept of a sequence."""
        runs = self._runs[self._run_bounds[place] : self._run_bounds[place + 1]]
        return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in runs])

    def columns(self, place: int) -> tuple[Columns, int]:
        """Return the columns of a sequence, and how many rows they have."""
        start, stop = int(self._rows[place]), int(self._rows[place + 1])
        found: Columns = {}
        for name, values in self._data().items():
            if name == "packed":
                assert self._packed is not None
                found[name] = values[int(self._packed[place]) : int(self._packed[place + 1])]
            else:
                found[name] = values[start:stop]
        return found, stop - start

    def _data(self) -> dict[str, Any]:
        if self._opened is None:
            self.verify()
            opened = safe_open(self.path, framework="pt")
            self._opened = {key: opened.get_slice(key) for key in opened.keys()}
        return self._opened

    def verify(self) -> None:
        """Raise ValueError where the data file is not what was sealed."""
        if not self.path.is_file():
            raise ValueError(f"{self.path}: {MENDED.format(what='is missing')}")
        if self.path.stat().st_size != self.bytes or digest_of_file(self.path) != self._about["data"]:
            raise ValueError(f"{self.path}: {MENDED.format(what='is damaged (its checksum differs)')}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # a mapped file does not travel to worker processes


MENDED = "this shard {what}; delete its two files and run `kdlm capture` again, which makes what is missing"


def sealed(folder: Path) -> Iterator[Path]:
    """Yield the index files of the sealed shards, in the order of their names."""
    yield from sorted(folder.glob(f"*{INDEX}"))


def _runs(positions: np.ndarray) -> np.ndarray:
    """Return ascending positions as `[runs, 2]` of start and stop, int32."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    starts, stops = positions[np.r_[0, breaks]], positions[np.r_[breaks - 1, len(positions) - 1]] + 1
    return np.stack([starts, stops], axis=-1).astype(np.int32)


def _bounds(ends: Tensor) -> np.ndarray:
    return np.r_[0, ends.numpy()]


def _digest(tensors: Columns, about: dict[str, str]) -> str:
    """Return the checksum of an index and of what it says about its data file."""
    digest = xxhash.xxh3_64(f"{about.get('data')} {about.get('bytes')}".encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
