"""The handwritten digits that come with scikit-learn: 1,797 grey images of 8 x 8."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

TEST_SHARE = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1] and what they show, 0 to 9."""

    images: Float[Tensor, "n 1 8 8"]
    labels: Int[Tensor, "n"]


def digits() -> tuple[Digits, Digits]:
    """Return (train, test): always the same split, every digit in the same share of both.

    Raises ImportError when scikit-learn, whose data it is, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    pixels, shown = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(shown, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = order[labels[order] == digit]
        test[members[: round(len(members) * TEST_SHARE)]] = True
    return Digits(images[~test], labels[~test]), Digits(images[test], labels[test])
