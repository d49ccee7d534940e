"""Rows of numbers in few bits: round to nearest, one step per group of 128, codes packed without gaps."""

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, UInt8
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
    """Return the bytes of so many codes; eight of them fill as many bytes as each has bits."""
    return -(-rows * length // 8) * bits if bits < 8 else rows * length * bits // 8


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
    groups, valid = _grouped(values)
    codes, steps = [], []
    for some, mask in zip(groups.split(BLOCK), valid.split(BLOCK), strict=True):
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


def lost(sample: Float[Tensor, "count"], bits: int) -> float:
    """Return the share of the energy of some numbers that rounding loses."""
    energy = float(sample.double().square().sum())
    if bits >= 16 or not energy:
        return LOSS[bits]
    groups, mask = _grouped(sample.reshape(1, -1))
    levels, step = _best(groups, mask, bits)
    return float(((levels * step - groups) * mask).double().square().sum()) / energy


def _grouped(rows: Float[Tensor, "rows length"]) -> tuple[Float[Tensor, "groups 128"], Float[Tensor, "groups 128"]]:
    """Return the groups of all rows, filled up with zeros, and ones where there is a number."""
    count, length = rows.shape
    groups = -(-length // GROUP)
    padded = torch.nn.functional.pad(rows.float(), (0, groups * GROUP - length)).reshape(-1, GROUP)
    valid = (torch.arange(groups * GROUP, device=rows.device) < length).float().reshape(groups, GROUP)
    return padded, valid.repeat(count, 1)


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


def _packed(codes: UInt8[Tensor, "count"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Return codes below 2^bits, one of each eighth to a word of as many bytes as a code has bits, the first lowest."""
    if bits == 8:
        return codes
    eighths = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).reshape(8, -1)
    words = torch.zeros(eighths.shape[1], dtype=torch.int32)
    for place, eighth in enumerate(eighths):
        words |= eighth.to(torch.int32) << bits * place
    return words[:, None].view(torch.uint8)[:, :bits].reshape(-1)


def _unpacked(packed: UInt8[Tensor, "bytes"], bits: int, count: int) -> UInt8[Tensor, "count"]:
    if bits == 8:
        return packed
    words = torch.nn.functional.pad(packed.reshape(-1, bits), (0, 4 - bits)).view(torch.int32).reshape(-1)
    eighths = torch.empty(8, len(words), dtype=torch.uint8)
    for place, eighth in enumerate(eighths):
        eighth.copy_(words >> bits * place & 2**bits - 1)
    return eighths.reshape(-1)[:count]


def to_bits(mask: Bool[Tensor, "count"]) -> UInt8[Tensor, "bytes"]:
    """Return truths as bits."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def from_bits(bits: UInt8[Tensor, "bytes"], count: int) -> Bool[Tensor, "count"]:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))
