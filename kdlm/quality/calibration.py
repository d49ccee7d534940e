"""Calibration: whether a classifier is right as often as it says. Everything is sums, so batches and ranks add up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15
PREFIX = "calibration_bin_"


def calibration_sums(log_q: Float[Tensor, "n classes"], labels: Int[Tensor, "n"]) -> dict[str, Float[Tensor, ""]]:
    """Return sums over rows: `brier`, squared distance to the one-hot label; for each bin, confidence less accuracy.

    Bins are of equal width over the probability of the likeliest class (Guo et al. 2017, arXiv 1706.04599).
    """
    q = log_q.exp()
    confidence, guess = q.max(-1)
    gap = confidence - (guess == labels).to(q)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # a bin holds its upper edge
    bins = torch.zeros(BINS, dtype=q.dtype, device=q.device).scatter_add_(0, place, gap)
    brier = q.square().sum() - 2 * q.gather(-1, labels[:, None]).sum() + len(q)
    return {"brier": brier, **{f"{PREFIX}{number}": value for number, value in enumerate(bins)}}


def with_calibration_error(means: dict[str, float]) -> dict[str, float]:
    """Return means over all rows with `ece` in place of the bins: the sum of their absolute values."""
    gaps = [abs(value) for name, value in means.items() if name.startswith(PREFIX)]
    others = {name: value for name, value in means.items() if not name.startswith(PREFIX)}
    return others | ({"ece": sum(gaps)} if gaps else {})
