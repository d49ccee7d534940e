"""Frechet distance between two sets of features, each taken for a Gaussian."""

from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.disk import write_bytes
from kdlm.quality.sets import as_rows


class FrechetStats:
    """Mean and covariance of a set of features, from sums in float64 that can be added up over batches and ranks.

    Only the count, the sum and the sum of outer products are kept, [width, width] in all: the set itself is not.
    The error of a variance is about 1e-16 times the square of mean over spread: features whose mean is a thousand times
    their spread keep ten digits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "n *shape"]) -> Self:
        """Take in a batch, of one row or more. Raises ValueError for values that are not finite or another width."""
        rows = as_rows(features, "features", least=1).to(self.total.device)
        if rows.shape[1] != len(self.total):
            raise ValueError(f"features of width {len(self.total)} are gathered here, got {rows.shape[1]}")
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer += rows.T @ rows
        return self

    def reduce(self) -> Self:
        """Add up over all ranks, once, after the last batch; without torch.distributed nothing happens."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for part in (self.count, self.total, self.outer):
                torch.distributed.all_reduce(part)
        return self

    @property
    def mean(self) -> Float[Tensor, "width"]:
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "width width"]:
        """The unbiased one, divided by n - 1. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows or more, got {int(self.count)}")
        return (self.outer - torch.outer(self.total, self.mean)) / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write them as a safetensors file: the statistics of a reference need computing only once."""
        from safetensors.torch import save

        parts = {"count": self.count, "total": self.total, "outer": self.outer}
        write_bytes(Path(path), save({name: part.cpu().contiguous() for name, part in parts.items()}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises ValueError for another file."""
        from safetensors.torch import load_file

        parts = load_file(path)
        if set(parts) != {"count", "total", "outer"}:
            raise ValueError(f"{path}: expected count, total and outer, as FrechetStats.save writes, got {set(parts)}")
        stats = cls(len(parts["total"]))
        stats.count, stats.total, stats.outer = parts["count"], parts["total"], parts["outer"]
        return stats


def frechet_distance(a: Float[Tensor, "n *shape"] | FrechetStats, b: Float[Tensor, "m *shape"] | FrechetStats) -> float:
    """Return `|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, in squared units of the features.

    Frechet distance of two Gaussians (Dowson and Landau 1982); with Inception features it is the FID of Heusel et al.
    (arXiv 1706.08500). It falls with n even for two draws of one distribution, so compare figures of equal n only; two
    halves of real data give the floor. In features alone it hides samples that vary too little: keep one in pixels
    beside it.

    Either side may be `FrechetStats`, of a reference that is gathered once. Two sets with fewer rows than columns are
    compared without a [width, width] matrix, which is the same number and fits images in pixels. Time is cubic in
    the width, or in the rows if they are fewer.

    Raises ValueError for fewer than two rows, unequal widths, or values that are not finite.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        rows_a, rows_b = as_rows(a, "the first set"), as_rows(b, "the second set")
        _same_width(rows_a.shape[1], rows_b.shape[1])
        if max(len(rows_a), len(rows_b)) <= rows_a.shape[1]:
            return _from_rows(rows_a, rows_b)
    a, b = (side if isinstance(side, FrechetStats) else _stats(side) for side in (a, b))
    _same_width(len(a.total), len(b.total))
    return _from_stats(a, b)


def _stats(features: Tensor) -> FrechetStats:
    rows = as_rows(features, "a set")
    return FrechetStats(rows.shape[1], rows.device).add(rows)


def _from_stats(a: FrechetStats, b: FrechetStats) -> float:
    """The trace of (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2), both of them symmetric."""
    device = a.total.device
    covariance_a, covariance_b = a.covariance, b.covariance.to(device)
    overlap = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    apart = (a.mean - b.mean.to(device)).square().sum()
    return max(0.0, (apart + covariance_a.trace() + covariance_b.trace() - 2 * overlap).item())


def _from_rows(a: Float[Tensor, "n width"], b: Float[Tensor, "m width"]) -> float:
    """With C = X^T X of the centred rows X / sqrt(n - 1), these singular values are those of X_a X_b^T, [n, m]."""
    centred_a, centred_b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    overlap = torch.linalg.svdvals(centred_a @ centred_b.T).sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (apart + centred_a.square().sum() + centred_b.square().sum() - 2 * overlap).item())


def _root(covariance: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """Symmetric square root; eigenvalues below rounding are 0, as they are with fewer rows than columns."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    roots = torch.where(values > rounding, values, 0).sqrt()
    return (vectors * roots) @ vectors.T


def _same_width(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"both sets must have one width, got {a} and {b}")
