"""Precision and recall of samples: how many lie among real ones, and how many real ones lie among them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.quality.sets import as_rows

ROWS = 1024  # of the distance matrix at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of samples.

    Attributes:
        precision: of the samples that lie in a ball around a real one: quality.
        recall: of the real ones that lie in a ball around a sample: variety. A student that collapsed has little.
        density: real balls that a sample lies in, over `neighbours`; may exceed 1. One stray real point counts little.
        coverage: of the real ones whose ball holds a sample; less swayed by stray samples than recall.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    samples: Float[Tensor, "n *shape"], reference: Float[Tensor, "m *shape"], *, neighbours: int = 3
) -> PrecisionRecall:
    """Return improved precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    The ball around a point reaches to the neighbour of the given rank in its own set. Take features, and as many
    samples as references: the balls shrink as sets grow. `neighbours` is 3 in the first paper, 5 in the second.
    No n x m matrix exists: distances are made for 1024 rows at a time.

    Raises ValueError for values that are not finite, for unequal widths, and for sets of no more than `neighbours`.
    """
    fake, real = as_rows(samples, "samples"), as_rows(reference, "reference")
    if fake.shape[1] != real.shape[1]:
        raise ValueError(f"samples and reference must have one width, got {fake.shape[1]} and {real.shape[1]}")
    if not 1 <= neighbours < min(len(fake), len(real)):
        sizes = f"{len(fake)} and {len(real)}"
        raise ValueError(
            f"neighbours must lie between 1 and the rows of each set less one, got {neighbours} of {sizes}"
        )
    fake_reach, real_reach = _reach(fake, neighbours), _reach(real, neighbours)
    inside = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)  # real balls around each sample
    found = torch.zeros(len(real), dtype=torch.bool, device=fake.device)
    covered = torch.zeros_like(found)
    for start in range(0, len(fake), ROWS):
        part = slice(start, start + ROWS)
        distances = _distances(fake[part], real)
        in_real = distances <= real_reach
        inside[part] = in_real.sum(1).double()
        covered |= in_real.any(0)
        found |= (distances <= fake_reach[part, None]).any(0)
    return PrecisionRecall(
        precision=(inside > 0).double().mean().item(),
        recall=found.double().mean().item(),
        density=inside.mean().item() / neighbours,
        coverage=covered.double().mean().item(),
    )


def _reach(rows: Float[Tensor, "n width"], neighbours: int) -> Float[Tensor, "n"]:
    """Distance of each row to its neighbour of that rank; the first of all is the row itself."""
    return torch.cat([_distances(part, rows).kthvalue(neighbours + 1).values for part in rows.split(ROWS)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """By differences, so that a row is at 0 from itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
