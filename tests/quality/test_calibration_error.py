"""Calibration and attacks: bins add up, sure answers cost what they should, and nearness is kept."""

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from kdlm.quality import (
    calibration_error,
    calibration_sums,
    carlini_wagner,
    fgsm,
    reliability,
    reliability_sums,
    with_calibration_error,
)

LINE = torch.tensor([[4.0, -1.0], [-3.0, 2.0]])


def linear(images):
    return images.flatten(1) @ LINE.T


def points(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    images = 2 * torch.rand(count, 1, 1, 2, generator=torch.Generator().manual_seed(0)) - 1
    return images, linear(images).argmax(-1)


def report(log_q, labels, *cuts):
    sums = [calibration_sums(a, b) for a, b in zip(log_q.split(list(cuts)), labels.split(list(cuts)), strict=True)]
    return with_calibration_error({name: sum(one[name].item() for one in sums) / len(labels) for name in sums[0]})


def test_bins_add_up_over_batches_to_the_definition():
    generator = torch.Generator().manual_seed(1)
    log_q = (3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
    labels = torch.randint(4, (50,), generator=generator)
    confidence, guess = log_q.exp().max(-1)
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.sum() / 50 * abs(confidence[inside].mean() - (guess == labels)[inside].double().mean())
    for cuts in ((50,), (13, 36, 1)):
        found = report(log_q, labels, *cuts)
        assert found["ece"] == pytest.approx(float(expected))
        one_hot = torch.nn.functional.one_hot(labels, 4)
        assert found["brier"] == pytest.approx((log_q.exp() - one_hot).square().sum(-1).mean().item())
    assert set(found) == {"ece", "brier"}


def test_who_is_sure_and_right_has_no_error_and_who_is_sure_and_wrong_all_of_it():
    log_q = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    assert report(log_q, torch.tensor([0, 0]), 2) == {"ece": 0.0, "brier": 0.0}
    assert report(log_q, torch.tensor([1, 1]), 2) == {"ece": 1.0, "brier": 2.0}


def test_the_reliability_diagram_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(2)
    confidence = torch.rand(400, generator=generator, dtype=torch.float64) ** 2
    correct = torch.rand(400, generator=generator, dtype=torch.float64) < confidence**1.5
    sums = reliability_sums(confidence[:37], correct[:37]) + reliability_sums(confidence[37:], correct[37:])
    found = reliability(sums)
    accuracy, mean_confidence = calibration_curve(correct.numpy(), confidence.numpy(), n_bins=15)
    np.testing.assert_allclose([value for value in found["accuracy"] if value is not None], accuracy)
    np.testing.assert_allclose([value for value in found["confidence"] if value is not None], mean_confidence)
    assert sum(found["count"]) == 400
    share = np.array([count for count in found["count"] if count]) / 400
    assert calibration_error(sums) == pytest.approx((share * np.abs(accuracy - mean_confidence)).sum())


def test_a_bin_without_rows_has_no_means():
    found = reliability(reliability_sums(torch.tensor([0.99, 1.0]), torch.tensor([True, False])))
    assert found["count"] == [0] * 14 + [2] and found["accuracy"] == [None] * 14 + [0.5]
    assert math.isnan(calibration_error(torch.zeros(3, 15)))


def test_fgsm_moves_each_value_by_epsilon_and_stays_inside():
    images, labels = points()
    moved = fgsm(linear, images, labels, epsilon=0.1, low=-1, high=1)
    inside = (images.abs() < 0.9).flatten()
    torch.testing.assert_close((moved - images).abs().flatten()[inside], torch.full((int(inside.sum()),), 0.1))
    assert moved.abs().max() <= 1
    margin = [linear(x).gather(1, labels[:, None]) - linear(x).gather(1, 1 - labels[:, None]) for x in (images, moved)]
    assert (margin[1] < margin[0]).all()


def test_fgsm_has_nothing_to_follow_where_logits_are_large_and_carlini_wagner_has():
    images, labels = points()

    def masked(x):
        return 1e4 * linear(x)

    clear = (linear(images)[:, 0] - linear(images)[:, 1]).abs() > 0.2
    images, labels = images[clear], labels[clear]
    assert torch.equal(fgsm(masked, images, labels, epsilon=0.3, low=-1, high=1), images)
    found = carlini_wagner(masked, images, labels, low=-1, high=1, steps=60, rate=0.1)
    assert (masked(found).argmax(-1) != labels).all()


def test_carlini_wagner_comes_near_the_border_of_a_linear_classifier():
    images, labels = points()
    found = carlini_wagner(linear, images, labels, low=-2, high=2, steps=150, searches=6, rate=0.02)
    fooled = linear(found).argmax(-1) != labels
    normal = LINE[0] - LINE[1]
    shortest = (images.flatten(1) @ normal).abs() / normal.norm()
    distance = (found - images).flatten(1).norm(dim=1)
    assert fooled.all() and (distance >= shortest - 1e-6).all()
    assert (distance - shortest).mean() < 0.1


def test_a_target_is_what_the_image_is_taken_for_and_a_hopeless_image_stays():
    images, labels = points()
    found = carlini_wagner(linear, images, labels, low=-1, high=1, target=1 - labels)
    assert (linear(found).argmax(-1) == 1 - labels).double().mean() > 0.9

    def blind(x):
        return torch.zeros(len(x), 2) + torch.tensor([1.0, 0.0]) + 0 * x.flatten(1)

    always = torch.zeros_like(labels)
    assert torch.equal(carlini_wagner(blind, images, always, low=-1, high=1, steps=2), images)
