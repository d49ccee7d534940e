"""Adaptive KL: its weight follows the gap, sorted right and without gradient."""

import pytest
import torch

from kdlm.losses import adaptive_kl, forward_kl, reverse_kl


def by_the_book(student, teacher, head_mass):
    """One row at a time, by sorting the whole vocabulary."""
    values = []
    for z_s, z_t in zip(student, teacher, strict=True):
        p, order = z_t.softmax(-1).sort(descending=True)
        gap = (p - z_s.softmax(-1)[order]).abs().detach()
        head = p.cumsum(-1) <= head_mass
        head[0] = True
        w = gap[head].sum() / gap.sum()
        values.append(w * forward_kl(z_s, z_t) + (1 - w) * reverse_kl(z_s, z_t))
    return torch.stack(values)


@pytest.mark.parametrize("head_mass", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("vocab", [11, 1271])  # the second has heads longer than one partial sort
def test_value_and_gradient_are_those_of_the_definition(draw, head_mass, vocab):
    student, teacher = draw(6, vocab).requires_grad_(), draw(6, vocab)
    ours, expected = adaptive_kl(student, teacher, head_mass=head_mass), by_the_book(student, teacher, head_mass)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), student)[0], torch.autograd.grad(expected.sum(), student)[0]
    )


def test_a_gap_in_the_head_alone_gives_forward_kl():
    teacher = torch.tensor([0.3, 0.2, 0.25, 0.25]).double().log()
    student = torch.tensor([0.2, 0.2, 0.35, 0.25]).double().log()
    torch.testing.assert_close(adaptive_kl(student, teacher, head_mass=0.6), forward_kl(student, teacher))


def test_a_gap_in_the_tail_alone_gives_reverse_kl():
    teacher = torch.tensor([0.6, 0.2, 0.1, 0.1]).double().log()
    student = torch.tensor([0.6, 0.1, 0.1, 0.2]).double().log()
    torch.testing.assert_close(adaptive_kl(student, teacher), reverse_kl(student, teacher))


def test_tokens_of_one_probability_enter_the_head_together():
    teacher = torch.zeros(8, dtype=torch.float64)
    student = torch.arange(8).double()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    torch.testing.assert_close(adaptive_kl(student[order], teacher), adaptive_kl(student, teacher))
