"""Calibration: whether a classifier is right as often as it says. Everything is sums, so batches and ranks add up."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

BINS = 15
PREFIX = "calibration_bin_"


def reliability_sums(confidence: Float[Tensor, "n"], correct: Shaped[Tensor, "n"]) -> Float[Tensor, "3 bins"]:
    """Return sums over rows for each of 15 bins: of the confidence, of the right answers, and how many rows there are.

    Bins are of equal width over the probability of the likeliest class (Guo et al. 2017, arXiv 1706.04599), which is
    `confidence`; `correct` is 1 where that class is the label.
    """
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # a bin holds its upper edge
    rows = torch.stack([confidence, correct.to(confidence), torch.ones_like(confidence)])
    return rows.new_zeros(3, BINS).index_add_(1, place, rows)


def calibration_error(sums: Float[Tensor, "3 bins"]) -> float:
    """Return ECE: the mean over rows of how far their bin's confidence is from its accuracy; nan without rows."""
    confidence, correct, count = sums.double()
    return ((confidence - correct).abs().sum() / count.sum()).item()


def reliability(sums: Float[Tensor, "3 bins"]) -> dict[str, list]:
    """Return the reliability diagram: mean confidence and accuracy of each bin, None where it is empty, and counts."""
    confidence, correct, count = sums.tolist()

    def means(totals: list[float]) -> list[float | None]:
        return [total / n if n else None for total, n in zip(totals, count, strict=True)]

    return {"confidence": means(confidence), "accuracy": means(correct), "count": [round(n) for n in count]}


def calibration_sums(log_q: Float[Tensor, "n classes"], labels: Int[Tensor, "n"]) -> dict[str, Float[Tensor, ""]]:
    """Return sums over rows: `brier`, squared distance to the one-hot label; for each bin, confidence less accuracy."""
    q = log_q.exp()
    confidence, guess = q.max(-1)
    sure, right, _ = reliability_sums(confidence, guess == labels)
    brier = q.square().sum() - 2 * q.gather(-1, labels[:, None]).sum() + len(q)
    return {"brier": brier, **{f"{PREFIX}{number}": value for number, value in enumerate(sure - right)}}


def with_calibration_error(means: dict[str, float]) -> dict[str, float]:
    """Return means over all rows with `ece` in place of the bins: the sum of their absolute values."""
    gaps = [abs(value) for name, value in means.items() if name.startswith(PREFIX)]
    others = {name: value for name, value in means.items() if not name.startswith(PREFIX)}
    return others | ({"ece": sum(gaps)} if gaps else {})
