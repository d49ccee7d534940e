"""The probability of a chunk as one yes or no, matched: its laws, and its numbers at the ends."""

import math

import pytest
import torch
from torch import Tensor

from kdlm.losses import chunk_kl, chunk_likelihood, label_log_probs
from kdlm.losses.chunk_likelihood import OFFSET
from kdlm.signal import TopK

ALL = ["binary_ce", "reverse_kl", "absolute", "k2"]


def log_probs(*, least: float = -9, most: float = 4, count: int = 97, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Chunks from nearly sure to nearly impossible, in another order for the teacher; float64."""
    student = -torch.logspace(least, most, count, dtype=torch.float64)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return student, student[order]


def slope(student: Tensor, teacher: Tensor, *options) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(chunk_likelihood(student, teacher, *options).sum(), student)[0]


def test_at_temperature_1_it_is_the_binary_cross_entropy_of_the_two_probabilities() -> None:
    student, teacher = log_probs(least=-3, most=1)
    expected = torch.nn.functional.binary_cross_entropy(student.exp(), teacher.exp(), reduction="none")
    torch.testing.assert_close(chunk_likelihood(student, teacher, 1.0), expected, rtol=1e-3, atol=1e-5)
    moderate = (student < -0.1) & (teacher < -0.1)
    torch.testing.assert_close(
        chunk_likelihood(student, teacher, 1.0)[moderate], expected[moderate], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_0_where_the_two_agree(divergence: str, temperature: float, dtype: torch.dtype) -> None:
    same = torch.cat([log_probs()[0], torch.zeros(2)]).to(dtype)
    assert slope(same, same, temperature, divergence).abs().max() <= 100 * torch.finfo(dtype).eps
    assert slope(same, same, 1.0, divergence).abs().max() == 0


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_numbers_from_sure_to_impossible_are_those_of_float64(divergence: str, temperature: float) -> None:
    student, teacher = log_probs()
    ours = chunk_likelihood(student.float(), teacher.float(), temperature, divergence)
    exact = chunk_likelihood(student, teacher, temperature, divergence)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    exact = slope(student, teacher, temperature, divergence)
    torch.testing.assert_close(
        slope(student.float(), teacher.float(), temperature, divergence).double(), exact, rtol=1e-4, atol=1e-4
    )


def test_its_slope_is_that_of_the_formula() -> None:
    """d/ds of the binary cross-entropy is (q - p) / (1 - q)."""
    student, teacher = log_probs()
    q, p = ((value / 100 - OFFSET).exp() for value in (student, teacher))
    torch.testing.assert_close(slope(student, teacher, 100.0), (q - p) / (1 - q), rtol=1e-6, atol=1e-9)


def test_a_sum_that_rounded_above_0_counts_as_sure_and_keeps_its_gradient() -> None:
    above, teacher = torch.tensor([3e-6, 0.0]), torch.tensor([-0.5, 1e-3])
    value = chunk_likelihood(above, teacher, 1.0)
    assert value.isfinite().all()
    assert torch.equal(value[0], chunk_likelihood(torch.zeros(1), teacher[:1], 1.0)[0])
    assert slope(above, teacher, 1.0)[0] > 0 and slope(above, teacher, 1.0)[1] == 0


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_gradcheck(divergence: str, temperature: float) -> None:
    student, teacher = log_probs(least=-1, most=1, count=11)
    torch.autograd.gradcheck(
        lambda s: chunk_likelihood(s, teacher, temperature, divergence), student.requires_grad_(), eps=1e-7
    )


def test_none_of_the_gradient_reaches_the_teacher() -> None:
    student, teacher = (value.requires_grad_() for value in log_probs())
    chunk_likelihood(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_for_large_temperatures_it_is_a_minus_b_log_a_and_a_constant() -> None:
    """Up to the offset, which is tau times 1e-6 nats."""
    a, b, tau = torch.tensor([0.5, 2.0, 7.0, 30.0]).double(), torch.tensor([7.0]).double(), 1e4
    value = chunk_likelihood(-a, -b.expand(4), tau)
    deviance = (a + tau * OFFSET) - (b + tau * OFFSET) * (a + tau * OFFSET).log()
    torch.testing.assert_close(value - value[2], deviance - deviance[2], rtol=1e-2, atol=1e-4)
    steep = slope(-a, -b.expand(4), tau)
    torch.testing.assert_close(steep, -(1 - (b + tau * OFFSET) / (a + tau * OFFSET)), rtol=5e-3, atol=1e-6)


def test_the_slope_hardly_depends_on_the_temperature() -> None:
    """So that its weight beside cross-entropy (slope 1) need not be found anew."""
    student, teacher = torch.tensor([-4.0]).double(), torch.tensor([-2.0]).double()
    torch.testing.assert_close(slope(student, teacher, 100.0), slope(student, teacher, 1000.0), rtol=0.02, atol=0)
    assert slope(student, teacher, 100.0).item() == pytest.approx(-0.5, rel=0.02)


def test_what_is_read_is_0_at_equality_and_the_entropy_of_the_teacher_less_than_the_loss() -> None:
    student, teacher = log_probs(least=-2, most=2)
    assert chunk_kl(student, student).abs().max() == 0
    read = chunk_kl(student, teacher)
    assert (read >= -1e-9).all() and read.max() > 1
    torch.testing.assert_close(chunk_likelihood(student, teacher) - chunk_likelihood(teacher, teacher), read)


@pytest.mark.parametrize("divergence", ["reverse_kl", "absolute", "k2"])
def test_the_others_are_0_at_equality_and_above_0_elsewhere(divergence: str) -> None:
    student, teacher = log_probs(least=-2, most=2)
    assert chunk_likelihood(student, student, 100.0, divergence).abs().max() == 0
    apart = student != teacher
    assert (chunk_likelihood(student, teacher, 100.0, divergence)[apart] > 0).all()


def test_reverse_kl_is_the_kl_of_two_coins() -> None:
    student, teacher = torch.tensor([-0.4]).double(), torch.tensor([-1.3]).double()
    q, p = math.exp(-0.4), math.exp(-1.3)
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert chunk_likelihood(student, teacher, 1.0, "reverse_kl").item() == pytest.approx(expected, rel=1e-5)


def test_absolute_is_the_difference_of_the_log_probabilities_at_any_temperature() -> None:
    student, teacher = log_probs()
    for tau in (1.0, 100.0):
        torch.testing.assert_close(
            chunk_likelihood(student, teacher, tau, "absolute"), (student - teacher).abs(), rtol=1e-9, atol=1e-9
        )


def test_of_the_k_best_only_labels_among_them_have_a_log_probability() -> None:
    best = TopK(torch.tensor([[4, 2], [1, 3]]), torch.tensor([[-0.1, -3.0], [-0.5, -1.0]]))
    torch.testing.assert_close(label_log_probs(best, torch.tensor([2, 7])), torch.tensor([-3.0, -math.inf]))
    nothing = TopK(torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert label_log_probs(nothing, torch.empty(0, dtype=torch.long)).shape == (0,)
