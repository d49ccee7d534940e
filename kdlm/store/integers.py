"""Columns of small whole numbers, compressed: the bulk of a capture.

A number is split into its bytes, and each byte plane is compressed by itself. Where the numbers are gaps between sorted
ids, or quantised log-probabilities, the low plane is close to noise and the high ones close to constant, and zstd's
entropy coder brings each near its entropy: what a hand-made bit packing would do, at the speed of C, and better where
the numbers are skewed.
"""

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_ZSTD = pa.Codec("zstd", compression_level=3)
_RAW = 1 << 31
"""Flag of a plane that compression would have made larger."""


def pack(columns: Sequence[np.ndarray]) -> bytes:
    """Return columns of non-negative integers below 2^32 as bytes; `unpack` needs to be told how long each is."""
    packed = bytearray()
    for column in columns:
        planes = np.ascontiguousarray(column.reshape(-1), dtype="<u4").view(np.uint8).reshape(-1, 4)
        used = next((n for n in range(4, 0, -1) if planes[:, n - 1].any()), 0)
        packed += struct.pack("<B", used)
        for number in range(used):
            raw = np.ascontiguousarray(planes[:, number]).tobytes()
            squeezed = _ZSTD.compress(raw, asbytes=True)
            smaller = len(squeezed) < len(raw)
            packed += struct.pack("<I", len(squeezed) if smaller else len(raw) | _RAW) + (squeezed if smaller else raw)
    return bytes(packed)


class Unpacker:
    """Reads what `pack` wrote, column by column."""

    def __init__(self, packed: bytes):
        self._packed, self._at = packed, 0

    def column(self, size: int) -> np.ndarray:
        """Return the next column, `[size]` of uint32. Raises ValueError where the bytes do not hold one."""
        try:
            return self._column(size)
        except (struct.error, pa.ArrowException, OSError) as error:
            raise ValueError(f"a packed column ends early or is damaged: {error}") from error

    def _column(self, size: int) -> np.ndarray:
        (used,) = struct.unpack_from("<B", self._packed, self._at)
        self._at += 1
        numbers = np.zeros(size, dtype=np.uint32)
        for number in range(used):
            (header,) = struct.unpack_from("<I", self._packed, self._at)
            length = header & ~_RAW
            body = self._packed[self._at + 4 : self._at + 4 + length]
            plane = body if header & _RAW else _ZSTD.decompress(body, size, asbytes=True)
            if len(plane) != size:
                raise struct.error(f"{len(plane)} numbers instead of {size}")
            numbers |= np.frombuffer(plane, dtype=np.uint8).astype(np.uint32) << (8 * number)
            self._at += 4 + length
        return numbers


def gaps(ids: np.ndarray) -> np.ndarray:
    """Return ascending, distinct ids `[rows, k]` as the numbers left out before each."""
    return np.diff(ids, axis=-1, prepend=-1) - 1


def from_gaps(left_out: np.ndarray) -> np.ndarray:
    """Return the ids of `gaps`, as int64."""
    return np.cumsum(left_out.astype(np.int64) + 1, axis=-1) - 1
