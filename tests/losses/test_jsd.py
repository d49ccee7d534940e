"""Generalised JSD in GKD's sense: its ends, its limits, its bounds."""

import math

import pytest
import torch

from kdlm.losses import forward_kl, generalised_jsd, reverse_kl


def test_the_ends_are_forward_and_reverse_kl(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(generalised_jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(generalised_jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))


def test_normalised_it_tends_to_its_ends_and_raw_it_tends_to_zero(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    for beta, limit in ((1e-5, forward_kl), (1 - 1e-5, reverse_kl)):
        near = generalised_jsd(student, teacher, beta=beta, normalised=True)
        torch.testing.assert_close(near, limit(student, teacher), rtol=1e-4, atol=1e-4)
        assert generalised_jsd(student, teacher, beta=beta).max() < 1e-4


def test_at_one_half_it_is_symmetric(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(generalised_jsd(student, teacher), generalised_jsd(teacher, student))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_it_never_exceeds_the_entropy_of_beta(draw, beta):
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    value = generalised_jsd(30 * draw(200, 41), 30 * draw(200, 41), beta=beta)
    assert value.max() <= bound + 1e-9
    assert value.max() > 0.9 * bound


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside_the_unit_interval_is_refused(draw, beta):
    with pytest.raises(ValueError, match="beta"):
        generalised_jsd(draw(5, 41), draw(5, 41), beta=beta)
