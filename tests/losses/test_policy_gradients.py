"""Estimators of reverse KL at a sampled token, on a vocabulary of ten that is summed over; sums along sequences."""

import pytest
import torch

from kdlm.losses import forward_kl, importance_weights, k3, returns, reverse_kl
from kdlm.signal import TopK


@pytest.fixture
def pair(draw):
    """Student logits with gradient, and what both give to each of ten tokens."""
    student, teacher = draw(10).requires_grad_(), draw(10)
    return student, teacher, student.log_softmax(-1), teacher.log_softmax(-1)


def mean_gradient(log_b, loss, student):
    """Gradient of the loss of each token, in mean over tokens drawn from b."""
    return torch.autograd.grad((log_b.detach().exp() * loss).sum(), student, retain_graph=True)[0]


def gradient(divergence, student, teacher):
    return torch.autograd.grad(divergence(student[None], teacher[None]).sum(), student)[0]


def test_k1_and_k3_are_unbiased_and_k2_is_not(pair):
    student, teacher, log_q, log_p = pair
    exact, d = reverse_kl(student[None], teacher[None])[0], log_q - log_p
    torch.testing.assert_close((log_q.exp() * d).sum(), exact)
    torch.testing.assert_close((log_q.exp() * k3(d)).sum(), exact)
    assert (k3(d) >= 0).all() and (d < 0).any()
    assert abs((log_q.exp() * d**2 / 2).sum() - exact) > 1e-2


def test_k1_as_a_loss_teaches_nothing_and_as_a_score_reverse_kl(pair):
    student, teacher, log_q, log_p = pair
    d = log_q - log_p
    assert mean_gradient(log_q, d, student).abs().max() < 1e-12
    score = mean_gradient(log_q, d.detach() * log_q, student)
    torch.testing.assert_close(score, gradient(reverse_kl, student, teacher))


def test_k2_has_the_gradient_of_reverse_kl_and_k3_that_of_forward_kl(pair):
    student, teacher, log_q, log_p = pair
    d = log_q - log_p
    torch.testing.assert_close(mean_gradient(log_q, d**2 / 2, student), gradient(reverse_kl, student, teacher))
    torch.testing.assert_close(mean_gradient(log_q, k3(d), student), gradient(forward_kl, student, teacher))


def test_k3_under_a_ratio_that_carries_gradient_has_that_of_reverse_kl(pair, draw):
    student, teacher, log_q, log_p = pair
    for log_b in (log_q.detach(), draw(10).log_softmax(-1)):
        loss = (log_q - log_b).exp() * k3(log_q - log_p)
        torch.testing.assert_close(mean_gradient(log_b, loss, student), gradient(reverse_kl, student, teacher))


def test_importance_weights_turn_a_mean_under_b_into_one_under_q(pair, draw):
    _, _, log_q, _ = pair
    log_b, value = draw(10).log_softmax(-1), draw(10)
    weights = importance_weights(log_q - log_b, torch.inf)
    assert not weights.requires_grad
    torch.testing.assert_close((log_b.exp() * weights * value).sum(), (log_q.exp() * value).sum().detach())
    cut = importance_weights(log_q - log_b, 1.1)
    torch.testing.assert_close(cut, weights.clamp(max=1.1))
    assert (cut < weights).any()
    assert importance_weights(torch.tensor([1e4]), 2.0).item() == pytest.approx(2.0)


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [[7], [3, 1, 5], [1, 1], [64]])
def test_returns_are_discounted_sums_from_each_token_to_the_end_of_its_sequence(draw, discount, lengths):
    rewards = [draw(n) for n in lengths]
    expected = [sum(discount ** (j - i) * r[j] for j in range(i, len(r))) for r in rewards for i in range(len(r))]
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    torch.testing.assert_close(returns(torch.cat(rewards), sequence, discount), torch.stack(expected))


def test_nothing_of_one_sequence_reaches_another(draw):
    rewards, sequence = draw(9), torch.tensor([4, 4, 4, 0, 0, 7, 7, 7, 7])
    other = torch.where(sequence == 0, rewards, torch.nan)
    assert torch.equal(returns(rewards, sequence)[3:5], returns(other, sequence)[3:5])
    assert returns(rewards[:0], sequence[:0]).shape == (0,)


def test_reverse_kl_on_top_k_and_tail_is_a_bound_with_zero_gradient_at_the_teacher(draw):
    """What a top-k teacher says on rollouts: the student's gradient moves the k tokens and the mass of the rest."""
    from kdlm.losses import ReverseKL

    teacher = draw(6, 10)
    log_p, ids = teacher.log_softmax(-1).topk(3, -1)
    signal = TopK(ids, log_p)
    student = draw(6, 10).requires_grad_()
    bucketed = ReverseKL()(student, signal)
    assert (bucketed < reverse_kl(student, teacher)).all() and (bucketed > 0).all()
    (moved,) = torch.autograd.grad(bucketed.sum(), student)
    torch.testing.assert_close(moved.sum(-1), torch.zeros(6, dtype=torch.float64))
    # Within the tail only the student's own proportions matter: the gradient is proportional to q there.
    tail = torch.ones(6, 10, dtype=torch.bool).scatter(1, ids, False)
    share = (moved / student.softmax(-1))[tail].view(6, 7)
    torch.testing.assert_close(share, share[:, :1].expand(6, 7))
    equal = teacher.clone().requires_grad_()
    same = ReverseKL()(equal, signal)
    torch.testing.assert_close(same, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(same.sum(), equal)[0], torch.zeros(6, 10, dtype=torch.float64))
