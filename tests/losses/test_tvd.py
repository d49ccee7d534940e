"""Total variation distance: acceptance of speculative sampling, and two forms of its gradient."""

import torch

from kdlm.losses import total_variation


def test_it_is_one_minus_the_acceptance_rate_of_speculative_sampling(draw):
    student, teacher = draw(11), draw(11)
    q, p = student.softmax(-1), teacher.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(q, 100_000, replacement=True, generator=generator)
    accepted = torch.rand(100_000, generator=generator, dtype=torch.float64) < (p / q)[drafts]
    rate = accepted.double().mean()
    error = (rate * (1 - rate) / 100_000).sqrt()
    assert abs(rate - (1 - total_variation(student, teacher))) < 4 * error


def test_both_forms_of_its_gradient_agree(draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    (ours,) = torch.autograd.grad(total_variation(student, teacher).sum(), student)
    q, p = student.softmax(-1).detach(), teacher.softmax(-1)
    reward = (p > q).double()
    torch.testing.assert_close(ours, -q * (reward - (q * reward).sum(-1, keepdim=True)))
    for baseline in (0.0, 0.7):
        policy = -(q * (reward - baseline) * student.log_softmax(-1)).sum()
        torch.testing.assert_close(ours, torch.autograd.grad(policy, student)[0])


def test_it_lies_between_zero_and_one(draw):
    value = total_variation(50 * draw(200, 41), 50 * draw(200, 41))
    assert value.min() >= 0 and 0.99 < value.max() <= 1 + 1e-9
