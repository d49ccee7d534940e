"""Maximum mean discrepancy and energy distance between two sets of samples or features, unbiased and differentiable.

Unlike the divergences beside it, this compares two sets and not two rows: its value belongs to a whole batch. Cut into
parts, the mean over the parts is still unbiased, with more variance.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Callable[[Float[Tensor, "rows width"], Float[Tensor, "columns width"]], Float[Tensor, "rows columns"]]

ROWS = 1024  # of the kernel matrix at once: without a graph no n x n tensor exists


def mmd2(a: Float[Tensor, "n width"], b: Float[Tensor, "m width"], kernel: Kernel) -> Float[Tensor, ""]:
    """Return the unbiased estimate of MMD^2, `E k(a, a') + E k(b, b') - 2 E k(a, b)` (Gretton et al., JMLR 2012).

    The diagonals are left out, which makes its mean 0 when both sets are drawn alike: single values may be negative.
    At least fp32 inside, also under autocast; the value is a small difference of large means, so measure in float64.
    The gradient flows into both sets. `kernel` is `polynomial`, an `RBFMixture` or any function of two sets.

    Raises ValueError for sets of other than [n, width], of unequal widths, or of fewer than two rows.
    """
    _refuse_odd_sets(a, b)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.to(dtype), b.to(dtype)
        return _within(a, kernel) + _within(b, kernel) - 2 * _across(a, b, kernel)


def energy_distance(a: Float[Tensor, "n width"], b: Float[Tensor, "m width"]) -> Float[Tensor, ""]:
    """Return `2 E |a - b| - E |a - a'| - E |b - b'|`, unbiased: the MMD^2 of the kernel `-|x - y|`.

    Szekely and Rizzo 2013; Sejdinovic et al. 2013 for the kernel. It has no bandwidth to choose. Raises as `mmd2` does.
    """
    return mmd2(a, b, negative_distance)


def polynomial(a: Float[Tensor, "rows width"], b: Float[Tensor, "columns width"]) -> Float[Tensor, "rows columns"]:
    """Return `(x . y / width + 1)^3`, the kernel of KID (arXiv 1801.01401) and of MMD-DDM (arXiv 2301.07969).

    It sees means, covariances and skewness. The square root of KID is not in use: papers give MMD^2 times 100 or 1000.
    """
    return (a @ b.T / a.shape[-1] + 1) ** 3


def negative_distance(
    a: Float[Tensor, "rows width"], b: Float[Tensor, "columns width"]
) -> Float[Tensor, "rows columns"]:
    """Return `-|x - y|`, the kernel of the energy distance. Its gradient at x = y is taken to be 0."""
    return -_distances(a, b)


class RBFMixture:
    """The mean of Gaussian kernels `exp(-|x - y|^2 / (2 s^2))` over the bandwidths s, in the units of the samples.

    Small bandwidths see the shape of a mode, large ones pull from afar: take some from the width of a mode to the
    width of the data. Raises ValueError for no bandwidth, or one that is not above 0.
    """

    def __init__(self, bandwidths: Sequence[float]) -> None:
        if not bandwidths or not all(bandwidth > 0 for bandwidth in bandwidths):
            raise ValueError(f"bandwidths must be one or more numbers above 0, got {list(bandwidths)}")
        self.bandwidths = tuple(bandwidths)

    def __call__(
        self, a: Float[Tensor, "rows width"], b: Float[Tensor, "columns width"]
    ) -> Float[Tensor, "rows columns"]:
        half = _distances(a, b).square() / 2
        return torch.stack([torch.exp(-half / bandwidth**2) for bandwidth in self.bandwidths]).mean(0)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """By differences: from products, near points lose half their digits."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _within(a: Tensor, kernel: Kernel) -> Tensor:
    """Mean of k(a_i, a_j) over i != j."""
    total = a.new_zeros(())
    for start in range(0, len(a), ROWS):
        values = kernel(a[start : start + ROWS], a)
        total = total + values.sum() - values.diagonal(start).sum()
    return total / (len(a) * (len(a) - 1))


def _across(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """Mean of k(a_i, b_j) over all pairs."""
    total = a.new_zeros(())
    for rows in a.split(ROWS):
        total = total + kernel(rows, b).sum()
    return total / (len(a) * len(b))


def _refuse_odd_sets(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"two sets of [n, width] are compared, got {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the unbiased estimate needs two rows or more in each set, got {len(a)} and {len(b)}")
