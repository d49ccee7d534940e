"""Sorted L1 knows masses and not tokens."""

import pytest
import torch

from kdlm.losses import sorted_l1
from kdlm.losses.sweep import sweep
from kdlm.signal import Dense, Head, Hidden, TopK


def logits(rows: int = 5, vocab: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def test_equal_and_permuted_rows_are_at_distance_0() -> None:
    ours = logits()
    for theirs in (ours, ours[:, torch.randperm(17)], torch.cat([ours, torch.full((5, 9), -1e3)], 1)):
        assert sorted_l1(ours, theirs).max() < 1e-14
        assert sorted_l1(ours, theirs, top_k=4).max() < 1e-14


def test_it_is_at_most_the_l1_distance_and_2_where_vocabularies_are_equal() -> None:
    ours, theirs = logits(), logits(seed=1)
    plain = (ours.softmax(-1) - theirs.softmax(-1)).abs().sum(-1)
    assert (sorted_l1(ours, theirs) < plain).all() and (plain <= 2).all()


@pytest.mark.parametrize("vocab", [9, 17, 30])
def test_the_longer_row_is_compared_with_zeros(vocab: int) -> None:
    ours, theirs = logits(), logits(vocab=vocab, seed=1)
    want = []
    for q, p in zip(ours.softmax(-1), theirs.softmax(-1), strict=True):
        q, p = sorted(q.tolist(), reverse=True), sorted(p.tolist(), reverse=True)
        size = max(len(q), len(p))
        q, p = q + [0.0] * (size - len(q)), p + [0.0] * (size - len(p))
        want.append(sum(abs(a - b) for a, b in zip(q, p, strict=True)))
    torch.testing.assert_close(sorted_l1(ours, theirs), torch.tensor(want, dtype=torch.float64))


def test_a_cut_is_a_lower_bound_that_rises_to_the_whole() -> None:
    ours, theirs = logits(), logits(vocab=12, seed=1)
    cuts = torch.stack([sorted_l1(ours, theirs, top_k=k) for k in (1, 2, 5, 12, 17)])
    assert (cuts.diff(dim=0) > -1e-12).all()
    torch.testing.assert_close(cuts[-1], sorted_l1(ours, theirs))


def test_a_teacher_of_a_few_tokens_gives_the_cut_of_the_whole_one() -> None:
    ours, theirs = logits(), logits(vocab=12, seed=1)
    ids = theirs.topk(4, dim=-1).indices.flip(-1)
    few = TopK(ids, theirs.log_softmax(-1).gather(-1, ids))
    torch.testing.assert_close(sorted_l1(ours, few), sorted_l1(ours, theirs, top_k=4))
    torch.testing.assert_close(sorted_l1(ours, few, top_k=3), sorted_l1(ours, theirs, top_k=3))
    with pytest.raises(ValueError, match="temperature 2"):
        sorted_l1(ours, few, temperature=2.0)


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_gradient_is_that_of_the_formula_and_none_reaches_the_teacher(top_k: int | None) -> None:
    ours, theirs = logits().requires_grad_(), logits(vocab=12, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sorted_l1(x, theirs.detach(), temperature=1.5, top_k=top_k), (ours,))
    sorted_l1(ours, theirs).sum().backward()
    assert theirs.grad is None


def test_vocabularies_of_two_sizes_run_in_chunks_of_rows() -> None:
    states, weight = logits(7, 6).requires_grad_(), logits(17, 6, seed=2).requires_grad_()
    other, their_weight = logits(7, 4, seed=3), logits(29, 4, seed=4)
    whole = sorted_l1(states @ weight.T, other @ their_weight.T)
    want = torch.autograd.grad(whole.sum(), (states, weight))
    for teacher in (Hidden(other, Head(their_weight)), Dense(other @ their_weight.T)):
        value = sweep(sorted_l1, Hidden(states, Head(weight)), teacher, vocab=None, chunk_rows=3)
        torch.testing.assert_close(value, whole)
        for mine, wanted in zip(torch.autograd.grad(value.sum(), (states, weight)), want, strict=True):
            torch.testing.assert_close(mine, wanted)
