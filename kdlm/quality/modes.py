"""Samples of a mixture whose modes are known, such as a ring of Gaussians in the plane."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.quality.sets import as_rows

REACH = 3.0  # standard deviations
COVERED = 0.1  # of what its weight promises: a mode with less is lost


@dataclass(frozen=True)
class ModeReport:
    """How samples lie on the modes.

    Attributes:
        good: share of samples within three standard deviations of a centre; of draws from the mixture itself in the
            plane 1 - exp(-4.5) = 0.989.
        modes: modes within three standard deviations of which lie a tenth or more of the samples that their weight
            promises.
        tv: total variation, half the sum of absolute differences, between the weights and the shares of all samples by
            the centre next to them. Of n draws from the mixture itself about `sum sqrt(w (1 - w)) * 0.4 / sqrt(n)`.
    """

    good: float
    modes: int
    tv: float


def mode_report(
    points: Float[Tensor, "n *shape"],
    centres: Float[Tensor, "modes *shape"],
    std: float,
    weights: Float[Tensor, "modes"] | None = None,
) -> ModeReport:
    """Report how samples lie on modes at `centres`, of standard deviation `std` in each direction.

    `weights` are those of the modes, equal when None; they are divided by their sum. The ring of diffusion papers has 8
    centres on a circle.

    Raises ValueError for values that are not finite, for weights that do not fit, and for a `std` that is not above 0.
    """
    rows, middle = as_rows(points, "points", least=1), as_rows(centres, "centres", least=1)
    if rows.shape[1] != middle.shape[1]:
        raise ValueError(f"points and centres must have one width, got {rows.shape[1]} and {middle.shape[1]}")
    if not std > 0:
        raise ValueError(f"std must be above 0, got {std}")
    expected = torch.ones(len(middle)) if weights is None else weights
    if expected.shape != (len(middle),) or not (expected >= 0).all() or not 0 < expected.sum() < torch.inf:
        raise ValueError(
            f"weights must be {len(middle)} numbers of 0 or more, one of a centre, got {expected.tolist()}"
        )
    expected = (expected / expected.sum()).to(rows)
    distance, nearest = torch.cdist(rows, middle).min(1)
    good = distance <= REACH * std
    shares = nearest.bincount(minlength=len(middle)).to(rows) / len(rows)
    good_shares = nearest[good].bincount(minlength=len(middle)).to(rows) / len(rows)
    return ModeReport(
        good=good.double().mean().item(),
        modes=int((good_shares >= COVERED * expected).logical_and(good_shares > 0).sum()),
        tv=(shares - expected).abs().sum().item() / 2,
    )
