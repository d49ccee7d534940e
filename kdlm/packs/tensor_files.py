"""safetensors files written one tensor at a time: what is larger than memory can be written."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What safetensors calls the data types."""

Kind = tuple[str, tuple[int, ...]]
"""Data type, as safetensors calls it, and shape."""


def size_of(kind: Kind) -> int:
    """Return the bytes of a tensor."""
    dtype, shape = kind
    count = 1
    for size in shape:
        count *= size
    return count * DTYPES[dtype].itemsize


def header_of(kinds: Mapping[str, Kind], metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Return what a file of these tensors begins with, and where behind that each tensor starts."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in sorted(kinds, key=lambda name: -DTYPES[kinds[name][0]].itemsize):
        starts[name], end = end, end + size_of(kinds[name])
        dtype, shape = kinds[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


class TensorFile:
    """A safetensors file whose tensors are known by type and shape before the first is there.

    The library writes a file from tensors that are all in memory. The format is a length, a header in JSON and the
    bytes of one tensor after another, so that each can be written when it comes, in any order. Wide types lie first,
    which keeps every tensor aligned.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Kind], metadata: Mapping[str, str] | None = None):
        header, self._starts = header_of(kinds, metadata)
        self._kinds, self._missing, self._data = kinds, set(kinds), len(header)
        self._file = open(path, "wb")
        self._file.write(header)
        self._file.truncate(self._data + sum(size_of(kind) for kind in kinds.values()))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor in its place."""
        dtype, shape = self._kinds[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], tuple(shape)), (name, tensor.dtype, tensor.shape)
        self._file.seek(self._data + self._starts[name])
        self._file.write(as_bytes(tensor).numpy().data)
        self._missing.discard(name)

    def write_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.write(name, tensor)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._file.close()
        assert kind is not None or not self._missing, f"not written: {sorted(self._missing)}"


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, `[bytes]` of uint8, without a copy where it lies in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
