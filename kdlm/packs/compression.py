"""Three ways to keep a delta in few bytes: factors of low rank, every entry in few bits, or the largest entries.

Each is a Section that says what it does to a matrix `[rows, columns]`, how many bytes that takes, and how to undo it.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.packs.quantization import bytes_of_codes, count_of_steps, dequantize, from_bits, quantize, to_bits
from kdlm.packs.tensor_files import Kind
from kdlm.section import Section

Bits = Literal[32, 16, 8, 4, 3, 2]
Coded = dict[str, Tensor]
"""`codes` (bytes), `steps` (bfloat16), and `mask` (bytes) of the largest entries."""
Quantized = tuple[Tensor, Tensor]
"""Codes and steps."""
Shape = tuple[int, int]
FITS = 2
"""Times that each factor is fitted to the rounded other one."""


class Part(NamedTuple):
    """Rows of numbers that are kept at so many bits; the parts of a delta lie behind one another."""

    rows: int
    length: int
    bits: int

    @property
    def codes(self) -> int:
        return bytes_of_codes(*self)

    @property
    def steps(self) -> int:
        return count_of_steps(*self)


class Compressed(Section):
    """A delta that is kept somehow."""

    def parts(self, shape: Shape) -> list[Part]:
        raise NotImplementedError

    def kinds(self, shape: Shape) -> dict[str, Kind]:
        """Return type and shape of every tensor that `encode` returns."""
        parts = self.parts(shape)
        steps = sum(part.steps for part in parts)
        codes: dict[str, Kind] = {"codes": ("U8", (sum(part.codes for part in parts),))}
        return codes | ({"steps": ("BF16", (steps,))} if steps else {})

    def bytes(self, shape: Shape) -> int:
        return sum(part.codes + 2 * part.steps for part in self.parts(shape))

    def encode(self, matrix: Float[Tensor, "rows columns"]) -> Coded:
        raise NotImplementedError

    def decode(self, coded: Coded, shape: Shape) -> Float[Tensor, "rows columns"]:
        raise NotImplementedError

    def _read(self, coded: Coded, shape: Shape) -> Iterator[Tensor]:
        """Yield the numbers of each part."""
        code = step = 0
        steps = coded.get("steps", torch.zeros(0, dtype=torch.bfloat16))
        for part in self.parts(shape):
            codes = coded["codes"][code : code + part.codes]
            yield dequantize(codes, steps[step : step + part.steps], *part)
            code, step = code + part.codes, step + part.steps


class Dense(Compressed):
    """Every entry, in so many bits."""

    name: Literal["dense"] = "dense"
    bits: Bits
    """32 is float32, 16 bfloat16; below, groups of 128 entries share a step."""

    def parts(self, shape: Shape) -> list[Part]:
        return [Part(1, shape[0] * shape[1], self.bits)]

    def encode(self, matrix: Tensor) -> Coded:
        return _together([quantize(matrix.reshape(1, -1), self.bits)])

    def decode(self, coded: Coded, shape: Shape) -> Tensor:
        return next(self._read(coded, shape)).reshape(shape)


class Pruned(Compressed):
    """The largest entries in so many bits, and a bit for each entry that says whether it is among them."""

    name: Literal["pruned"] = "pruned"
    kept: int = Field(ge=0)
    """How many."""
    bits: Bits

    def parts(self, shape: Shape) -> list[Part]:
        return [Part(1, self.kept, self.bits)]

    def kinds(self, shape: Shape) -> dict[str, Kind]:
        return super().kinds(shape) | {"mask": ("U8", (-(-shape[0] * shape[1] // 8),))}

    def bytes(self, shape: Shape) -> int:
        return super().bytes(shape) + -(-shape[0] * shape[1] // 8)

    def encode(self, matrix: Tensor) -> Coded:
        flat = matrix.reshape(-1)
        mask = torch.zeros(flat.shape, dtype=torch.bool)
        mask[flat.abs().topk(self.kept, sorted=False).indices.cpu()] = True
        coded = _together([quantize(flat[mask.to(flat.device)].reshape(1, -1), self.bits)])
        return coded | {"mask": to_bits(mask)}

    def decode(self, coded: Coded, shape: Shape) -> Tensor:
        matrix = torch.zeros(shape[0] * shape[1])
        matrix[from_bits(coded["mask"], matrix.numel())] = next(self._read(coded, shape)).reshape(-1)
        return matrix.reshape(shape)


class LowRank(Compressed):
    """Two factors from the singular value decomposition, their leading columns in more bits (GraftLLM, 2505.18502).

    GraftLLM quantises both factors with GPTQ, which needs calibration data. Here rounding is to nearest, and what it
    did wrong is fed back without data: each factor is fitted by least squares to the rounded other one, and a band of
    fewer bits is taken from the decomposition of what the bands before it left over.
    """

    name: Literal["low_rank"] = "low_rank"
    bands: tuple[tuple[Bits, int], ...] = Field(min_length=1)
    """Bits, and how many singular directions are kept at them, in the order of their singular values."""

    @property
    def rank(self) -> int:
        return sum(count for _, count in self.bands)

    def parts(self, shape: Shape) -> list[Part]:
        return [Part(count, size, bits) for bits, count in self.bands for size in (min(shape), max(shape))]

    def encode(self, matrix: Tensor) -> Coded:
        left = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        coded: list[Quantized] = []
        for bits, count in self.bands:
            _, vectors = spectrum(left)
            small = vectors[:, :count].T.float()
            if bits == 32:
                (small, codes), (large, others) = _rounded(small, 32), _rounded(small @ left.T, 32)
            else:
                small, codes, large, others = _rounded_pair(small, left, bits)
            coded += [codes, others]
            left = left - large.T @ small
        return _together(coded)

    def decode(self, coded: Coded, shape: Shape) -> Tensor:
        numbers = list(self._read(coded, shape))
        small, large = torch.cat(numbers[::2]), torch.cat(numbers[1::2])
        return large.T @ small if shape[0] >= shape[1] else small.T @ large


AnyCompressed = Annotated[Dense | Pruned | LowRank, Field(discriminator="name")]


def spectrum(tall: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "columns"], Float[Tensor, "columns columns"]]:
    """Return squared singular values, descending, and right singular vectors of a matrix with rows >= columns.

    From the eigenvectors of its Gram matrix in float64: they are orthogonal whatever the spectrum, so that
    (matrix @ vectors) @ vectors.T is the matrix, and the norm of what is cut off is that of the columns cut off.
    """
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(1 << 14):
        gram += rows.double().T @ rows.double()
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _rounded_pair(small: Tensor, wanted: Tensor, bits: int) -> tuple[Tensor, Quantized, Tensor, Quantized]:
    """Return the factors of `wanted` as they come back, each with its codes."""
    best, least = None, torch.inf
    for _ in range(FITS):
        near, codes = _rounded(small, bits)
        large, others = _rounded(_fitted(near, wanted.T), bits)
        error = (wanted - large.T @ near).norm().item()
        if best is None or error < least:
            best, least = (near, codes, large, others), error
        small = _fitted(large, wanted)
    assert best is not None
    return best


def _rounded(rows: Tensor, bits: int) -> tuple[Tensor, Quantized]:
    """Return rows as they come back, and their codes and steps."""
    coded = quantize(rows, bits)
    return dequantize(*coded, *rows.shape, bits).to(rows.device), coded


def _fitted(rows: Float[Tensor, "rank m"], wanted: Float[Tensor, "m n"]) -> Float[Tensor, "rank n"]:
    """Return the x that minimises || rows^T x - wanted ||, in Frobenius norm."""
    gram = rows.double() @ rows.double().T
    ridge = 1e-9 * gram.diagonal().mean()  # rows may depend on one another once they are rounded
    gram.diagonal().add_(ridge.clamp_min(torch.finfo(torch.float64).tiny))
    return torch.linalg.solve(gram, (rows @ wanted).double()).float()


def _together(coded: list[Quantized]) -> Coded:
    codes, steps = (torch.cat(some) for some in zip(*coded, strict=True))
    return {"codes": codes} | ({"steps": steps} if len(steps) else {})


def as_matrix(delta: Float[Tensor, "..."]) -> Float[Tensor, "rows columns"]:
    """Return a delta of any shape as a matrix: experts `[experts, out, in]` below one another, kernels side by side."""
    if delta.ndim == 3:
        return delta.flatten(0, 1)
    return delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
