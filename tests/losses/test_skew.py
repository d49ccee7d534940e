"""Skew KL and skew reverse KL: limits, bound, and gradient where KL explodes."""

import math

import pytest
import torch

from kdlm.losses import forward_kl, reverse_kl, skew_kl, skew_reverse_kl


def test_without_skew_they_are_the_two_kls(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(skew_kl(student, teacher, skew=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.0), reverse_kl(student, teacher))
    torch.testing.assert_close(skew_kl(student, teacher, skew=1e-9), forward_kl(student, teacher))


@pytest.mark.parametrize("function", [skew_kl, skew_reverse_kl])
def test_the_value_never_exceeds_minus_the_log_of_the_skew(draw, function):
    value = function(40 * draw(200, 41), 40 * draw(200, 41), skew=0.1)
    assert value.max() <= -math.log(0.1) + 1e-9
    assert value.max() > 0.9 * -math.log(0.1)


def test_one_is_the_other_with_the_models_swapped(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(skew_reverse_kl(student, teacher), skew_kl(teacher, student))


def test_the_gradient_stays_bounded_where_that_of_reverse_kl_explodes():
    def norm(function, gap):
        student = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor([0.0, 0.0, -gap], dtype=torch.float64)
        return torch.autograd.grad(function(student, teacher), student)[0].norm()

    assert norm(reverse_kl, 1000.0) > 50 * norm(reverse_kl, 10.0)
    assert norm(skew_reverse_kl, 1000.0) < 1.1 * norm(skew_reverse_kl, 10.0)


@pytest.mark.parametrize("function", [skew_kl, skew_reverse_kl])
def test_the_student_inside_the_mixture_carries_gradient(draw, function):
    student, teacher = draw(41).requires_grad_(), draw(41)
    value = function(student, teacher, skew=0.3)
    log_p, log_q, fixed = (z.log_softmax(-1) for z in (teacher, student, student.detach()))
    ours = torch.autograd.grad(value, student)[0]
    if function is skew_reverse_kl:
        log_m = torch.log(0.7 * log_p.exp() + 0.3 * fixed.exp())
        detached = (log_q.exp() * (log_q - log_m)).sum()
        torch.testing.assert_close(detached, value)
        theirs = torch.autograd.grad(detached, student)[0]
        assert (ours - theirs).norm() > 0.01 * ours.norm()
    else:
        assert ours.norm() > 0


@pytest.mark.parametrize("function", [skew_kl, skew_reverse_kl])
def test_a_skew_of_one_is_refused(draw, function):
    with pytest.raises(ValueError, match="skew"):
        function(draw(5, 41), draw(5, 41), skew=1.0)


def test_each_row_can_have_its_own_skew(draw):
    student, teacher, skew = draw(5, 17), draw(5, 17), torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    for divergence in (skew_kl, skew_reverse_kl):
        apart = [divergence(student[i], teacher[i], skew=skew[i].item()) for i in range(5)]
        torch.testing.assert_close(divergence(student, teacher, skew=skew), torch.stack(apart))
