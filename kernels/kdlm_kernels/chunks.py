"""How many rows are projected at once: the one cost model, for every device.

A chunk reads both heads, and reads and writes the head's gradient, once, whatever its number of rows. The four
products do `2 rows V (H_t + 3 H_s)` FLOP meanwhile. So the share of time that this traffic takes falls as
1 / rows, and the memory of the two buffers rises with the rows: the model takes the fewest rows at which the share is
small, and fewer where the memory would not do.
"""

import math
from typing import NamedTuple

import torch

LIMIT = {"cpu": 320 << 20, "cuda": 1 << 30}
"""Most bytes of the buffers of a chunk, and of what fp32 adds to the head's gradient while it is summed (at least a
quarter is left for the buffers), by device; others count as cuda."""
_BALANCE = {"cpu": 10.0, "cuda": 200.0}
"""FLOP that a device does while it moves one byte, estimated: two AVX2 cores, an H100 or H200."""
_SHARE = 0.1
"""Share of the products' time at which more rows are no longer worth their memory."""
_MULTIPLE = 64
"""Rows of a chunk come in multiples of this: a loss took a sixth longer in chunks of 205 rows than of 256."""
_OF_FREE = 0.5
"""Share of a GPU's free memory that buffers may take."""


class Chunks(NamedTuple):
    """Rows of every chunk, how many there are, the bytes of their buffers, and the head traffic's share of time."""

    rows: int
    number: int
    bytes: int
    traffic: float


def plan_chunks(
    rows: int,
    *,
    vocab: int,
    student_width: int,
    teacher_width: int = 0,
    teacher_vocab: int | None = None,
    itemsize: int = 2,
    device: str = "cuda",
    trained: bool = True,
    free: int | None = None,
) -> Chunks:
    """Return the chunks of a call.

    Args:
        teacher_width: 0 where the teacher is not projected.
        itemsize: bytes of a head's element.
        trained: whether the head gets a gradient, which is summed in fp32 within the same memory.
        free: bytes free on the device.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    theirs = 0 if not teacher_width else (vocab if teacher_vocab is None else teacher_vocab)
    # Logits are kept in fp32 (float64 where the model is); a narrow gradient has a buffer of its own.
    wide = max(itemsize, 4)
    per_row = (vocab + theirs) * wide + (vocab * itemsize if kind == "cuda" and itemsize < wide else 0)
    moved = vocab * (2 * itemsize + 2 * wide * trained) * student_width + theirs * itemsize * teacher_width
    work = 2 * ((2 + trained) * vocab * student_width + theirs * teacher_width)
    summed = vocab * student_width * (wide - itemsize) if trained else 0
    most = max(LIMIT[kind] - summed, LIMIT[kind] // 4)
    most = most if free is None else min(most, int(free * _OF_FREE))
    enough = math.ceil(_BALANCE[kind] * moved / (work * _SHARE))
    fit = max(16, most // per_row)
    size = max(1, min(rows, enough, fit))
    even = math.ceil(rows / max(1, math.ceil(rows / size)))
    size = max(1, min(rows, _rounded(even, fit)))
    return Chunks(size, math.ceil(rows / size), size * per_row, _BALANCE[kind] * moved / (work * size))


def _rounded(rows: int, most: int) -> int:
    """Return the multiple that is next to `rows` and at most `most`, or `most` where that is less than one."""
    up, down = math.ceil(rows / _MULTIPLE) * _MULTIPLE, most // _MULTIPLE * _MULTIPLE
    return up if up <= most else down or min(rows, most)


def free_bytes(device: torch.device) -> int | None:
    """Return what a GPU has left, what torch holds without using it counted in; None for a CPU."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
