"""Rows of numbers in few bits: round to nearest, one step per group of 128, codes packed without gaps."""

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Shaped, UInt8
from torch import Tensor

GROUP = 128
"""Numbers that share a step, as in GraftLLM."""
NORMAL_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
"""Best step of a uniform quantiser of so many bits for normal numbers of unit variance (Max, 1960): a first guess."""
LOSS = {32: 0.0, 16: 1e-6, 8: 1e-4, 4: 0.0115, 3: 0.0374, 2: 0.1188}
"""About the share of the energy of normal numbers that is lost at so many bits."""
REFITS = 3
BLOCK = 1 << 15
"""Groups quantised at once, which bounds the memory."""


def bytes_of_codes(rows: int, length: int, bits: int) -> int:
    return -(-rows * length * bits // 8)


def count_of_steps(rows: int, length: int, bits: int) -> int:
    return rows * -(-length // GROUP) if bits < 16 else 0


def quantize(
    values: Float[Tensor, "rows length"], bits: int
) -> tuple[UInt8[Tensor, "bytes"], BFloat16[Tensor, "steps"]]:
    """Return codes and steps of rows of numbers.

    At 32 and 16 bits the numbers themselves are kept, in float32 and bfloat16. Below, a number is (code + 1/2) steps,
    with codes from -2^(bits - 1): round to nearest, without calibration data. The step of each group starts from the
    largest number and from what suits normal numbers, is refitted to its codes by least squares, and the better of the
    two is kept. A group of zeros stays zero.
    """
    if bits >= 16:
        kept = values.to(torch.float32 if bits == 32 else torch.bfloat16).contiguous().cpu()
        return kept.reshape(-1).view(torch.uint8), torch.zeros(0, dtype=torch.bfloat16)
    rows, length = values.shape
    groups = -(-length // GROUP)
    padded = torch.nn.functional.pad(values.float(), (0, groups * GROUP - length)).reshape(-1, GROUP)
    valid = (torch.arange(groups * GROUP, device=values.device) < length).float().reshape(groups, GROUP).repeat(rows, 1)
    codes, steps = [], []
    for some, mask in zip(padded.split(BLOCK), valid.split(BLOCK), strict=True):
        levels, step = _best(some, mask, bits)
        codes.append((levels - 0.5 + 2 ** (bits - 1)).to(torch.uint8).cpu())
        steps.append(step.bfloat16().cpu())
    flat = torch.cat(codes).reshape(rows, -1)[:, :length].reshape(-1)
    return _packed(flat, bits), torch.cat(steps).reshape(-1)


def dequantize(
    codes: UInt8[Tensor, "bytes"], steps: BFloat16[Tensor, "steps"], rows: int, length: int, bits: int
) -> Float[Tensor, "rows length"]:
    """Return the numbers that `quantize` left, in float32."""
    if bits >= 16:
        kept = codes.clone().view(torch.float32 if bits == 32 else torch.bfloat16)  # a copy is aligned
        return kept.float().reshape(rows, length)
    levels = _unpacked(codes, bits, rows * length).float() - (2 ** (bits - 1) - 0.5)
    wide = steps.float().reshape(rows, -1).repeat_interleave(GROUP, dim=1)[:, :length]
    return levels.reshape(rows, length) * wide


def _best(values: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return levels (halves) `[groups, GROUP]` and steps `[groups, 1]` of the better of two starts."""
    half = 2 ** (bits - 1)
    spread = (values.square().sum(1, keepdim=True) / mask.sum(1, keepdim=True)).sqrt()
    found: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(spread, torch.inf)
    for step in (values.abs().amax(1, keepdim=True) / half, spread * NORMAL_STEP[bits]):
        for _ in range(REFITS):
            levels = _levels(values, step, half) * mask
            step = (values * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
        step = step.bfloat16().float()
        levels = _levels(values, step, half)
        error = ((levels * step - values).square() * mask).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        old_levels, old_step = found or (levels, step)
        found = torch.where(better, levels, old_levels), torch.where(better, step, old_step)
    assert found is not None
    return found


def _levels(values: Tensor, step: Tensor, half: int) -> Tensor:
    ratio = torch.where(step > 0, values / step, 0.0)
    return ratio.floor().clamp(-half, half - 1) + 0.5


def _packed(codes: Shaped[Tensor, "count"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Return codes below 2^bits as bits behind one another."""
    if bits == 8:
        return codes
    places = np.arange(bits, dtype=np.uint8)
    pieces = [  # a piece is a whole number of bytes
        np.packbits((piece.numpy()[:, None] >> places) & 1) for piece in codes.split(GROUP * BLOCK)
    ]
    return torch.from_numpy(np.concatenate(pieces))


def _unpacked(packed: UInt8[Tensor, "bytes"], bits: int, count: int) -> UInt8[Tensor, "count"]:
    if bits == 8:
        return packed
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes, size = np.empty(count, np.uint8), GROUP * BLOCK
    for start in range(0, count, size):
        some = min(size, count - start)
        at = start * bits // 8
        read = np.unpackbits(packed[at : at + bytes_of_codes(1, some, bits)].numpy(), count=some * bits)
        codes[start : start + some] = read.reshape(some, bits) @ weights
    return torch.from_numpy(codes)


def to_bits(mask: Bool[Tensor, "count"]) -> UInt8[Tensor, "bytes"]:
    """Return truths as bits."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def from_bits(bits: UInt8[Tensor, "bytes"], count: int) -> Bool[Tensor, "count"]:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))
