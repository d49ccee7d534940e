import math

import pytest
import torch
from torch import Tensor

from kdlm.losses import mmd2, polynomial
from kdlm.quality import accuracy_of, frechet_distance, precision_recall, quality_of, seen_by
from kdlm.sandbox.digits import digits
from kdlm.sandbox.digits_classifier import digits_classifier


@pytest.fixture(scope="module")
def net():
    return digits_classifier(progress=None)


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, Tensor, Tensor]:
    """Two disjoint draws of 300 digits in [-1, 1], and what the first ones show."""
    train, _ = digits()
    images, order = train.images * 2 - 1, torch.randperm(len(train.labels))  # neighbours are of one hand
    return images[order[:300]], images[order[300:600]], train.labels[order[:300]]


def test_the_figures_are_those_of_the_functions_by_the_names_of_the_logs(net, halves):
    samples, reference, labels = halves
    figures = quality_of(samples, reference, features=net, labels=labels)
    assert set(figures) == {"fd_pixel", "fd", "precision", "recall", "mmd", "accuracy"}
    a, b = seen_by(net, samples)[0], seen_by(net, reference)[0]
    manifold = precision_recall(a, b)
    assert figures["fd_pixel"] == frechet_distance(samples, reference)
    assert figures["fd"] == frechet_distance(a, b)
    assert (figures["precision"], figures["recall"]) == (manifold.precision, manifold.recall)
    assert figures["mmd"] == mmd2(a.double(), b.double(), polynomial).item()
    assert figures["accuracy"] == accuracy_of(net(samples)[1], labels)
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures.values())


def test_noise_faded_digits_and_real_ones_come_in_this_order(net, halves):
    samples, reference, _ = halves
    noise, faded, real = (
        quality_of(made, reference, features=net) for made in (torch.randn_like(samples), samples * 0.7, samples)
    )
    for name in ("fd", "fd_pixel", "mmd"):
        assert noise[name] > 2 * faded[name] > 4 * real[name], name
    assert noise["precision"] < 0.1 and real["precision"] > 0.7


def test_labels_in_another_order_are_wrong(net, halves):
    samples, reference, labels = halves
    assert quality_of(samples, reference, features=net, labels=(labels + 1) % 10)["accuracy"] < 0.05


@pytest.mark.parametrize("shape", [(50, 2), (20, 3, 4, 4), (12, 5, 7)])
def test_points_images_and_sequences_are_measured_without_a_network(shape):
    assert set(quality_of(torch.randn(shape), torch.randn(shape))) == {"fd_pixel", "precision", "recall", "mmd"}


def test_the_network_sees_every_sample_once_and_leaves_no_graph():
    weight = torch.ones(3, 3, requires_grad=True)
    seen = []

    def net(samples: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(samples))
        return samples @ weight, samples

    features, _ = seen_by(net, torch.randn(600, 3))
    assert seen == [256, 256, 88] and len(features) == 600 and not features.requires_grad


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_compared_is_refused(net):
    with pytest.raises(ValueError, match=r"as many samples as references.*\[20, 2\] and \[30, 2\]"):
        quality_of(torch.randn(20, 2), torch.randn(30, 2))
    with pytest.raises(ValueError, match="accuracy needs a classifier"):
        quality_of(torch.randn(20, 2), torch.randn(20, 2), labels=torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ValueError, match="samples: 20 of 20 samples hold values that are not finite"):
        quality_of(torch.full((20, 2), torch.nan), torch.randn(20, 2))
    with pytest.raises(ValueError, match=r"one label a row of logits, got \[3\] for \[4, 10\]"):
        accuracy_of(torch.randn(4, 10), torch.zeros(3, dtype=torch.int64))
