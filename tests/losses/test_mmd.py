from functools import partial
from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck

from kdlm.losses import RBFMixture, energy_distance, mmd, mmd2, negative_distance, polynomial

KERNELS = {"polynomial": polynomial, "rbf": RBFMixture([0.3, 1.0, 3.0]), "distance": negative_distance}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_its_mean_over_all_halvings_of_a_set_is_exactly_zero(kernel):
    """Every pair is then as often within a half as across: the law of an unbiased estimate, without statistics."""
    rows = draws(8, 3)
    halvings = [torch.tensor(half) for half in combinations(range(8), 4)]
    rest = [torch.tensor(sorted(set(range(8)) - set(half.tolist()))) for half in halvings]
    values = torch.stack([mmd2(rows[a], rows[b], kernel) for a, b in zip(halvings, rest, strict=True)])
    assert values.abs().max() > 1e-3
    assert values.mean().abs() < 1e-12


def test_two_draws_of_one_distribution_are_at_zero_in_the_mean_and_with_the_diagonals_are_not(kernel):
    """Within four standard errors: with two, one seed in twenty would fail."""
    pairs = [(draws(40, 2), draws(60, 2)) for _ in range(200)]
    values = torch.stack([mmd2(a, b, kernel) for a, b in pairs])
    assert values.mean().abs() < 4 * values.std() / 200**0.5
    biased = torch.stack([kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean() for a, b in pairs])
    assert biased.mean().abs() > 8 * biased.std() / 200**0.5


def test_sets_that_differ_in_mean_or_spread_are_apart(kernel):
    a, b = draws(200, 2), draws(200, 2)
    assert mmd2(a, b + 1, kernel) > 10 * mmd2(a, b, kernel).abs()
    assert mmd2(a, 2 * b, kernel) > 3 * mmd2(a, b, kernel).abs()


def test_it_is_the_double_sum_over_pairs(kernel):
    a, b = draws(5, 3), draws(7, 3)
    k = lambda x, y: kernel(x[None], y[None]).item()  # noqa: E731
    within = [sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) for s in (a, b)]
    across = sum(k(x, y) for x in a for y in b)
    expected = within[0] / 20 + within[1] / 42 - 2 * across / 35
    assert mmd2(a, b, kernel).item() == pytest.approx(expected, rel=1e-12)


def test_the_number_of_rows_at_once_and_the_order_are_inert(kernel, monkeypatch):
    a, b = draws(23, 3), draws(17, 3)
    whole = mmd2(a, b, kernel)
    monkeypatch.setattr(mmd, "ROWS", 5)
    torch.testing.assert_close(mmd2(a, b, kernel), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mmd2(b[torch.randperm(17)], a, kernel), whole, rtol=1e-10, atol=1e-12)


def test_the_gradient_reaches_both_sets_and_is_right(kernel):
    a, b = draws(4, 3).requires_grad_(), draws(5, 3).requires_grad_()
    assert gradcheck(partial(mmd2, kernel=kernel), (a, b))


def test_equal_points_have_a_gradient(kernel):
    a = torch.zeros(3, 2, requires_grad=True)
    mmd2(a, torch.ones(3, 2), kernel).backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_descending_it_moves_points_onto_the_others():
    target = draws(64, 2) * 0.3 + 2
    points = draws(64, 2).requires_grad_()
    before = energy_distance(points, target).item()
    optimizer = torch.optim.Adam([points], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        energy_distance(points, target).backward()
        optimizer.step()
    assert energy_distance(points, target).item() < 0.05 * before


def test_the_energy_distance_of_far_clusters_is_twice_the_way_between_them():
    a, b = draws(500, 2) * 1e-3, draws(500, 2) * 1e-3 + torch.tensor([30.0, 40.0])
    assert energy_distance(a, b).item() == pytest.approx(100, abs=0.01)


def test_autocast_and_half_precision_do_not_reach_inside(kernel):
    a, b = torch.randn(9, 4), torch.randn(9, 4)
    expected = mmd2(a, b, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd2(a, b, kernel), expected)
    assert mmd2(a.bfloat16(), b.bfloat16(), kernel).dtype == torch.float32


@pytest.mark.usefixtures("unchecked_shapes")
def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"\[5, 3\] and \[5, 4\]"):
        mmd2(draws(5, 3), draws(5, 4), polynomial)
    with pytest.raises(ValueError, match="two rows or more"):
        mmd2(draws(1, 3), draws(5, 3), polynomial)
    with pytest.raises(ValueError, match="above 0"):
        RBFMixture([1.0, 0.0])
