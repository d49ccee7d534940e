"""Alpha-mixture: one family that holds skew KL and interpolated logits."""

import pytest
import torch

from kdlm.losses import alpha_mixture, forward_kl, skew_kl
from kdlm.losses.mixture import _power_mean


def test_the_arithmetic_mean_is_skew_kl(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(
        alpha_mixture(student, teacher, alpha=-1.0, share=0.3), skew_kl(student, teacher, skew=0.3)
    )


def test_the_geometric_mean_is_the_softmax_of_interpolated_logits(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    interpolated = forward_kl(0.7 * student + 0.3 * teacher, teacher)
    torch.testing.assert_close(alpha_mixture(student, teacher, alpha=1.0, share=0.3), interpolated)
    for near in (0.9999, 1.0001):
        value = alpha_mixture(student, teacher, alpha=near, share=0.3)
        torch.testing.assert_close(value, interpolated, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [-3.0, -1.0, 0.0, 1.0, 3.0])
def test_the_mean_is_the_power_mean_of_probabilities_and_equal_ones_are_fixed(draw, alpha):
    log_p, log_q, e = draw(41).log_softmax(-1), draw(41).log_softmax(-1), (1 - alpha) / 2
    ours = _power_mean(log_p, log_q, 0.3, e).exp()
    expected = (0.3 * log_p.exp() ** e + 0.7 * log_q.exp() ** e) ** (1 / e) if e else (0.3 * log_p + 0.7 * log_q).exp()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(_power_mean(log_p, log_p, 0.3, e), log_p)


def test_without_a_share_of_the_teacher_it_is_forward_kl(draw):
    student, teacher = draw(5, 41), draw(5, 41)
    torch.testing.assert_close(alpha_mixture(student, teacher, share=0.0), forward_kl(student, teacher))


def test_a_share_of_one_is_refused(draw):
    with pytest.raises(ValueError, match="share"):
        alpha_mixture(draw(5, 41), draw(5, 41), share=1.0)
