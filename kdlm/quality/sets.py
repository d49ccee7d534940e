"""What is compared: a set of samples or features, [n, *shape], read as n rows of float64."""

from jaxtyping import Float
from torch import Tensor


def as_rows(samples: Float[Tensor, "n *shape"], name: str, *, least: int = 2) -> Float[Tensor, "n width"]:
    """Return the samples flattened to [n, width], float64, without a graph.

    Raises ValueError, with `name`, for fewer than `least` of them, for no values in them, and for values that are not
    finite, with the number of samples that have such: of these no figure means anything.
    """
    if samples.ndim < 2 or samples[0:1].numel() == 0 or len(samples) < least:
        raise ValueError(f"{name}: expected {least} or more samples as [n, *shape], got {list(samples.shape)}")
    rows = samples.detach().flatten(1).double()
    if odd := int((~rows.isfinite()).any(1).sum()):
        raise ValueError(f"{name}: {odd} of {len(rows)} samples hold values that are not finite")
    return rows
