"""Random-sampling KD: noisy where top-k is biased."""

import pytest
import torch

from kdlm.losses import ForwardKL, sampled_cross_entropy
from kdlm.signal import Sampled

DRAWS, ROWS, VOCAB = 12, 20_000, 16


def sample(teacher):
    """Draw for many rows that have one teacher: ids with their counts, padded by count 0."""
    ids = torch.multinomial(
        teacher.softmax(-1).expand(ROWS, -1), DRAWS, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.zeros(ROWS, VOCAB, dtype=torch.float64).scatter_add_(-1, ids, torch.ones(ROWS, DRAWS).double())
    counts, ids = counts.sort(descending=True)
    return Sampled(ids[:, :DRAWS], counts[:, :DRAWS])


def gradients(loss, student):
    rows = student.expand(ROWS, -1).clone().requires_grad_()
    return torch.autograd.grad(loss(rows).sum(), rows)[0]


def test_the_expected_gradient_is_that_of_forward_kl_and_that_of_renormalised_top_k_is_not(draw):
    student, teacher = draw(VOCAB), 2 * draw(VOCAB)
    signal = sample(teacher)
    assert (signal.counts.sum(-1) == DRAWS).all()
    full = student.softmax(-1) - teacher.softmax(-1)
    drawn = gradients(lambda rows: sampled_cross_entropy(rows, signal), student)
    error = drawn.std(0) / ROWS**0.5
    assert ((drawn.mean(0) - full).abs() < 4 * error).all()

    kept, ids = teacher.softmax(-1).topk(3)
    truncated = student.softmax(-1).index_add(0, ids, -kept / kept.sum())
    assert ((truncated - full).abs() > 10 * error).any()


def test_finite_differences_agree_with_the_gradient(draw):
    signal = Sampled(torch.tensor([[1, 5, 0], [2, 2, 6]]), torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 1.0]]).double())
    assert torch.autograd.gradcheck(lambda s: sampled_cross_entropy(s, signal), draw(2, 7).requires_grad_())


def test_padding_and_rows_without_a_draw_are_inert(draw):
    student = draw(2, 7).requires_grad_()
    padded = Sampled(torch.tensor([[1, 0], [0, 0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]).double())
    value = sampled_cross_entropy(student, padded)
    torch.testing.assert_close(value, torch.stack([-student[0].log_softmax(-1)[1], torch.tensor(0.0).double()]))
    gradient = torch.autograd.grad(value.sum(), student)[0]
    assert gradient.isfinite().all() and (gradient[1] == 0).all()


def test_the_value_at_equality_is_the_entropy_and_not_zero(draw):
    teacher = draw(1, 7)
    p = teacher.softmax(-1)
    value = sampled_cross_entropy(teacher, Sampled(torch.arange(7)[None], p))
    torch.testing.assert_close(value, -(p * p.log()).sum(-1))


def test_a_temperature_is_refused_with_the_reason(draw):
    signal = Sampled(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    with pytest.raises(ValueError, match="drawn at temperature 1"):
        ForwardKL(temperature=2.0)(draw(1, 7), signal)
