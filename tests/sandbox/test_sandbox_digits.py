import sys

import pytest
import torch

from kdlm.sandbox.digits import digits


def test_the_digits_are_images_in_the_unit_interval_with_their_labels():
    train, test = digits()
    for part in (train, test):
        assert part.images.shape == (len(part.labels), 1, 8, 8)
        assert part.images.dtype == torch.float32 and part.labels.dtype == torch.int64
        assert part.images.min() == 0 and part.images.max() == 1
    assert len(train.labels) + len(test.labels) == 1_797


def test_every_digit_has_the_same_share_in_both_parts():
    train, test = digits()
    share = test.labels.bincount(minlength=10) / (train.labels.bincount(minlength=10) + test.labels.bincount())
    torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.005, rtol=0)


def test_the_split_does_not_move_with_the_seed():
    first = digits()
    torch.manual_seed(7)
    second = digits()
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits()
