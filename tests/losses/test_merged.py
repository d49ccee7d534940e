"""GOLD's merged rows: what they are made of, and what the hybrid loss makes of them."""

import pytest
import torch

from kdlm.losses import Hybrid, Matched, generalised_jsd, merged_divergence, sorted_l1
from kdlm.signal import Dense, Head, Hidden

ROWS = 6


def logits(vocab: int, seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def partly(**options) -> Hybrid:
    matched = Matched.of(torch.tensor([1, 4, 3, 7]), torch.tensor([0, 2, 1, 6]), 9, 8, rest=True)
    return Hybrid(matched, 0.5, 0.5, **options)


def others(*seeds: int) -> list[torch.Tensor]:
    """Log-probabilities of the other tokens of groups, of which every second has one token."""
    made = [torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(s)).log() for s in seeds]
    return [x * (torch.arange(ROWS) % 2) for x in made]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_one_vocabulary_and_groups_of_one_token_give_the_generalised_jsd(beta: float) -> None:
    ids = torch.arange(9)
    hybrid = Hybrid(Matched.of(ids, ids, 9, 9, rest=True), 1.0, 0.0, beta, temperature=1.3)
    student, teacher, nothing = logits(9).requires_grad_(), logits(9, 1), torch.zeros(ROWS, dtype=torch.float64)
    value, _ = merged_divergence(Dense(student), Dense(teacher), nothing, nothing, hybrid)
    want = generalised_jsd(student, teacher, beta=beta, temperature=1.3, t_squared=False)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)
    ours, wanted = (torch.autograd.grad(x.sum(), student)[0] for x in (value, want))
    torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-7)


def test_without_matched_ids_it_is_the_sorted_l1() -> None:
    none = torch.empty(0, dtype=torch.long)
    hybrid = Hybrid(Matched.of(none, none, 9, 8, rest=True), 0.0, 1.0)
    student, teacher, nothing = logits(9), logits(8, 1), torch.zeros(ROWS, dtype=torch.float64)
    value, _ = merged_divergence(Dense(student), Dense(teacher), nothing, nothing, hybrid)
    torch.testing.assert_close(value, sorted_l1(student, teacher))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_jsd_is_one_of_distributions(beta: float) -> None:
    """0 at equality and nowhere negative, of groups of several tokens too."""
    (ours, theirs) = others(3, 4)
    jsd, _ = partly(beta=beta).parts(logits(9), logits(8, 1), ours, theirs)
    assert (jsd > 0).all()
    same = Matched.of(torch.arange(4), torch.arange(4), 9, 9, rest=True)
    jsd, l1 = Hybrid(same, 0.5, 0.5, beta).parts(logits(9), logits(9), ours, ours)
    assert jsd.abs().max() < 1e-12 and l1.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_reach_the_row_and_the_other_tokens_of_the_group(beta: float) -> None:
    student, (ours, theirs) = logits(9).requires_grad_(), others(3, 4)
    ours = (ours - 0.1).requires_grad_()  # not at the edge of what a log-probability can be

    def whole(z: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        jsd, l1 = partly(beta=beta).parts(z, logits(8, 1), own, theirs)
        return (0.5 * jsd + 0.5 * l1).sum()

    assert torch.autograd.gradcheck(whole, (student, ours))
    want = torch.autograd.grad(whole(student, ours), (student, ours))
    value, parts = merged_divergence(Dense(student), Dense(logits(8, 1)), ours, theirs, partly(beta=beta))
    assert set(parts) == {"jsd", "sorted_l1"}
    for mine, wanted in zip(torch.autograd.grad(value.sum(), (student, ours)), want, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_from_hidden_states_in_chunks_it_is_the_same_and_the_teacher_gets_no_gradient() -> None:
    states, weight = logits(5).requires_grad_(), logits(5, 2, rows=9).requires_grad_()
    other, their_weight = logits(4, 3).requires_grad_(), logits(4, 4, rows=8).requires_grad_()
    (ours, theirs) = others(5, 6)
    ours.requires_grad_(), theirs.requires_grad_()
    dense, _ = merged_divergence(Dense(states @ weight.T), Dense(other @ their_weight.T), ours, theirs, partly())
    want = torch.autograd.grad(dense.sum(), (states, weight, ours))
    student, teacher = Hidden(states, Head(weight)), Hidden(other, Head(their_weight))
    value, _ = merged_divergence(student, teacher, ours, theirs, partly(), chunk_rows=4)
    torch.testing.assert_close(value, dense)
    for mine, wanted in zip(torch.autograd.grad(value.sum(), (states, weight, ours)), want, strict=True):
        torch.testing.assert_close(mine, wanted)
    merged_divergence(student, teacher, ours, theirs, partly())[0].sum().backward()
    assert other.grad is None and their_weight.grad is None and theirs.grad is None


def test_no_groups_give_no_values() -> None:
    none = torch.empty(0, dtype=torch.float64)
    value, parts = merged_divergence(Dense(logits(9, rows=0)), Dense(logits(8, rows=0)), none, none, partly())
    assert len(value) == 0 and set(parts) == {"jsd", "sorted_l1"}
