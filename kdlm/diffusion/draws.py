"""Draws: random numbers that belong to a sample, whatever micro-batch, rank or device it lies on.

A step's noise and times must not depend on how its batch was cut, must differ between ranks, and must be the same
after a resume. torch's generators give none of the three per sample, so each number is a hash (splitmix64, Steele et
al. 2014) of the run's seed, the step, the sample, the name of the draw and the place in the tensor.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
SECOND = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step.

    Attributes:
        index: number of each sample of the batch in its data; samples of one step must differ in it.
        seed, step: of the run.
    """

    index: Int[Tensor, "batch"]
    seed: int
    step: int

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Float[Tensor, "batch *shape"]:
        """Return numbers in (0, 1), independent over names, samples, steps and seeds."""
        return _uniform(self._hashed(name, shape)).float().clamp(2**-24, 1 - 2**-24)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Float[Tensor, "batch *shape"]:
        """Return standard normal numbers."""
        return torch.special.ndtri(_uniform(self._hashed(name, shape))).float()

    def integer(self, name: str, below: int) -> Int[Tensor, "batch"]:
        """Return whole numbers from 0 to `below - 1`."""
        return (self.uniform(name) * below).long().clamp(max=below - 1)

    def shared(self, name: str) -> float:
        """Return one number in [0, 1) that all samples and ranks of the step have in common."""
        digest = hashlib.blake2b(f"{self.seed} {self.step} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64

    def _hashed(self, name: str, shape: Sequence[int]) -> Int[Tensor, "batch *shape"]:
        keys = _mixed(self.index + _number(f"{self.seed} {self.step} {name}"))
        places = torch.arange(1, 1 + math.prod(shape), device=keys.device) * GOLDEN
        return _mixed(keys[:, None] + places).reshape(len(keys), *shape)


@lru_cache(maxsize=4096)
def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _mixed(z: Tensor) -> Tensor:
    """Return splitmix64's finaliser of 64-bit integers; products wrap around."""
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in; here zeros are


def _uniform(z: Tensor) -> Tensor:
    return (_shifted(z, 11).double() + 0.5) * 2.0**-53
