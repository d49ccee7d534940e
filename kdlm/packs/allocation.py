"""How each delta is kept, so that the error of all of them together is least for the bytes that there are.

Bytes and squared Frobenius errors both add up over the tensors, so one price per byte settles everything: at a price,
each tensor takes what is cheapest in error + price * bytes, and the price is found at which the bytes suffice (the
Lagrangian of a knapsack). Within a tensor each singular direction i costs the same and is worth s_i^2, so that the
leading ones get more bits: GraftLLM's order (arXiv 2505.18502), with the counts that it sets by hand chosen here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from kdlm.packs.compression import Bits, Compressed, Dense, LowRank, Pruned, Shape, spectrum
from kdlm.packs.quantization import LOSS, count_of_steps, lost

DIRECTION_BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
ENTRY_BITS: tuple[Bits, ...] = (16, 8, 4, 3, 2)
KEPT = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
"""Shares of the entries that pruning may keep, beside all that are not zero."""
SAMPLE = 1 << 16
"""Entries that an error is estimated from."""
PRICES = 60
"""Halvings of the range of prices."""


class Choice(NamedTuple):
    """A way to keep a delta (None: not at all), its bytes, and about its squared error."""

    how: Compressed | None
    bytes: int
    error: float


@dataclass(frozen=True)
class Survey:
    """What can be done with one delta.

    Attributes:
        shape: rows and columns.
        energy: squared norm.
        squares: squared singular values, descending; none of a vector.
        choices: ways to keep it other than by factors.
    """

    shape: Shape
    energy: float
    squares: np.ndarray
    choices: tuple[Choice, ...]

    def at(self, price: float) -> Choice:
        """Return what is cheapest in error + price * bytes."""
        best = min(self.choices, key=lambda choice: choice.error + price * choice.bytes)
        if len(self.squares):
            factors = self._factors(price)
            if factors.error + price * factors.bytes < best.error + price * best.bytes:
                return factors
        return best

    def _factors(self, price: float) -> Choice:
        """Give each singular direction the bits that are worth it: those with s_i^2 above a threshold for each step."""
        bits, losses, steps = self._hull
        ends = np.searchsorted(-self.squares, [-price * step for step in steps])  # how many are worth so many bits
        bounds, bands, error = [*ends[::-1].tolist(), len(self.squares)], [], 0.0
        for start, end, width, loss in zip([0, *bounds[:-1]], bounds, bits[::-1], losses[::-1], strict=True):
            if end > start:
                error += loss * (self._sums[end] - self._sums[start])
                bands += [(width, end - start)] if width else []
        if not bands:
            return Choice(None, 0, self.energy)
        how = LowRank(bands=tuple(bands))
        return Choice(how, how.bytes(self.shape), float(error))

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(self.squares)])

    @cached_property
    def _hull(self) -> tuple[list[int], list[float], list[float]]:
        """Return the bits that are best at some price, ascending, their losses, and bytes over gain of each step."""
        points = [(0, 1.0, 0.0)]  # bits, loss, bytes
        steps: list[float] = []
        for bits in DIRECTION_BITS[::-1]:
            loss, cost = 1 - (1 - LOSS[bits]) ** 2, _direction_bytes(self.shape, bits)  # both factors are rounded
            while steps and (cost - points[-1][2]) / (points[-1][1] - loss) <= steps[-1]:
                points.pop()
                steps.pop()
            steps.append((cost - points[-1][2]) / (points[-1][1] - loss))
            points.append((bits, loss, cost))
        return [point[0] for point in points], [point[1] for point in points], steps


def _direction_bytes(shape: Shape, bits: int) -> float:
    return sum(size * bits / 8 + 2 * count_of_steps(1, size, bits) for size in shape)


def survey(matrix: Float[Tensor, "rows columns"], vector: bool) -> Survey:
    """Look at a delta: its spectrum, and what other ways to keep it would cost.

    A `vector` (norms, biases) is kept in bfloat16 whatever it costs: it is small, and weighs more than its entries do.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    energy = float(matrix.double().square().sum())
    if not energy:
        return Survey(shape, energy, np.zeros(0), (Choice(None, 0, energy),))
    if vector:
        how = Dense(bits=16)
        return Survey(shape, energy, np.zeros(0), (Choice(how, how.bytes(shape), LOSS[16] * energy),))
    flat = matrix.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLE)]
    whole = Dense(bits=32)
    choices = [Choice(None, 0, energy), Choice(whole, whole.bytes(shape), 0.0)]
    for bits in ENTRY_BITS:
        dense = Dense(bits=bits)
        choices.append(Choice(dense, dense.bytes(shape), energy * lost(sample, bits)))
    choices += _pruned(sample, int(flat.count_nonzero()), shape, energy)
    tall = matrix if shape[0] >= shape[1] else matrix.T
    return Survey(shape, energy, spectrum(tall)[0].cpu().numpy(), tuple(choices))


def _pruned(sample: Tensor, nonzero: int, shape: Shape, energy: float) -> list[Choice]:
    """Return what keeping only the largest entries would cost."""
    ordered = sample.abs().sort(descending=True).values
    total = float(ordered.double().square().sum()) or 1.0
    found = []
    for kept in sorted({nonzero, *(int(share * shape[0] * shape[1]) for share in KEPT)}):
        if not 0 < kept <= nonzero or kept == shape[0] * shape[1]:
            continue
        threshold = ordered[min(len(ordered), max(1, round(kept * len(ordered) / (shape[0] * shape[1])))) - 1]
        largest = sample[sample.abs() >= threshold]
        covered = float(largest.double().square().sum()) / total
        for bits in ENTRY_BITS[1:]:
            pruned = Pruned(kept=kept, bits=bits)
            error = energy * (1 - covered * (1 - lost(largest, bits)))
            found.append(Choice(pruned, pruned.bytes(shape), error))
    return found


def allocate(surveys: Mapping[str, Survey], budget: int) -> dict[str, Choice]:
    """Return how to keep each delta within `budget` bytes. Raises ValueError where not even the vectors fit."""
    least = sum(min(choice.bytes for choice in survey.choices) for survey in surveys.values())
    if least > budget:
        raise ValueError(f"a pack of these models takes {least - budget} bytes more than its share: raise --share")
    low, high = 1e-40, 1.0 + max((survey.energy for survey in surveys.values()), default=0.0)
    for _ in range(PRICES):
        price = math.sqrt(low * high)
        if _bytes(surveys, price) <= budget:
            high = price
        else:
            low = price
    found = {name: survey.at(high) for name, survey in surveys.items()}
    return _filled(surveys, found, budget)


def _bytes(surveys: Mapping[str, Survey], price: float) -> int:
    return sum(survey.at(price).bytes for survey in surveys.values())


def _filled(surveys: Mapping[str, Survey], found: dict[str, Choice], budget: int) -> dict[str, Choice]:
    """Spend what is left over, tensor by tensor, on those that lose most: a price can only be met by jumps."""
    left = budget - sum(choice.bytes for choice in found.values())
    for name in sorted(found, key=lambda name: -found[name].error):
        better = _best_within(surveys[name], found[name].bytes + left)
        if better.error < found[name].error:
            left -= better.bytes - found[name].bytes
            found[name] = better
    return found


def _best_within(survey: Survey, most: int) -> Choice:
    low, high = 1e-40, 1.0 + survey.energy
    for _ in range(PRICES):
        price = math.sqrt(low * high)
        low, high = (low, price) if survey.at(price).bytes <= most else (price, high)
    return survey.at(high)
