"""TAID's interpolated target: from the student itself to the teacher."""

import pytest
import torch

from kdlm.losses import forward_kl, taid_kl


def gradient(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


def test_at_zero_there_is_nothing_to_learn(draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    value = taid_kl(student, teacher, t=0.0)
    assert (value == 0).all()
    assert gradient(value, student).abs().max() < 1e-15


def test_at_one_it_is_forward_kl(draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    ours, forward = taid_kl(student, teacher, t=1.0), forward_kl(student, teacher)
    torch.testing.assert_close(ours, forward)
    torch.testing.assert_close(gradient(ours, student), gradient(forward, student))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_the_difference_to_the_interpolated_target(draw, temperature):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    target = ((0.6 * student + 0.4 * teacher) / temperature).softmax(-1)
    expected = temperature * ((student / temperature).softmax(-1) - target)
    torch.testing.assert_close(
        gradient(taid_kl(student, teacher, t=0.4, temperature=temperature), student), expected.detach()
    )


def test_the_value_rises_with_t(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    values = torch.stack([taid_kl(student, teacher, t=t / 10) for t in range(11)])
    assert (values.diff(dim=0) > 0).all()


def test_a_t_outside_the_unit_interval_is_refused(draw):
    with pytest.raises(ValueError, match="t must"):
        taid_kl(draw(5, 41), draw(5, 41), t=1.5)
