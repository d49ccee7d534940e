"""Forward and reverse KL: identities of their gradients, torch's own, and what they make a student do."""

import torch
import torch.nn.functional as F

from kdlm.losses import cross_entropy, forward_kl, reverse_kl


def gradient(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


def test_the_gradient_of_forward_kl_is_temperature_times_the_difference(draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    for t in (0.5, 1.0, 4.0):
        expected = t * ((student / t).softmax(-1) - (teacher / t).softmax(-1))
        torch.testing.assert_close(gradient(forward_kl(student, teacher, temperature=t), student), expected)


def test_forward_kl_tends_to_matching_centred_logits_as_temperature_grows(draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / 41
    errors = [(gradient(forward_kl(student, teacher, temperature=t), student) - limit).norm() for t in (100.0, 1000.0)]
    assert errors[0] < 0.1 * limit.norm()
    assert errors[1] < 0.15 * errors[0]  # of first order in 1/T


def test_the_gradient_of_reverse_kl_is_the_centred_log_ratio(draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41)
    value = reverse_kl(student, teacher)
    q, log_ratio = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(gradient(value, student), q * (log_ratio - value[:, None]))


def test_the_score_estimator_over_the_vocabulary_is_the_gradient_of_reverse_kl(draw):
    student, teacher = draw(7).requires_grad_(), draw(7)
    log_q = student.log_softmax(-1)
    log_ratio = (log_q - teacher.log_softmax(-1)).detach()
    expected = (log_q.exp().detach() * log_ratio * log_q).sum()
    torch.testing.assert_close(gradient(reverse_kl(student, teacher), student), gradient(expected, student))


def test_both_agree_with_torch(draw):
    student, teacher = draw(5, 1271), draw(5, 1271)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), forward)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(reverse_kl(student, teacher), reverse)


def test_cross_entropy_agrees_with_torch_and_ignores_ignored_labels(draw):
    student = draw(2, 5, 41)
    labels = torch.randint(41, (2, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 3] = -100
    expected = F.cross_entropy(student.movedim(-1, 1), labels, reduction="none")
    torch.testing.assert_close(cross_entropy(student, labels), expected)
    assert cross_entropy(student, labels)[0, 3] == 0


def test_bfloat16_error_is_at_most_twice_that_of_torch(draw):
    student, teacher = draw(41, 1271, dtype=torch.bfloat16), draw(41, 1271, dtype=torch.bfloat16)
    exact = forward_kl(student.double(), teacher.double())
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    torchs = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert (forward_kl(student, teacher) - exact).abs().max() <= 2 * (torchs - exact).abs().max()


def test_forward_kl_covers_two_modes_and_reverse_kl_picks_one():
    grid = torch.linspace(-6, 6, 61)
    teacher = torch.logaddexp(-((grid - 2.5) ** 2) / 0.5, -((grid + 2.5) ** 2) / 0.5 - 0.1)

    def fit(divergence):
        mean, log_width = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        optimiser = torch.optim.Adam([mean, log_width], lr=0.05)
        for _ in range(400):
            optimiser.zero_grad()
            divergence(-((grid - mean) ** 2) / (2 * (2 * log_width).exp()), teacher).backward()
            optimiser.step()
        return mean.item(), log_width.exp().item()

    mean, width = fit(forward_kl)
    assert abs(mean) < 0.5 and width > 2
    mean, width = fit(reverse_kl)
    assert abs(mean - 2.5) < 0.2 and width < 1
