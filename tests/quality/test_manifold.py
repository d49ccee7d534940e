import pytest
import torch

from kdlm.quality import manifold, precision_recall


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_set_is_as_good_and_as_varied_as_itself():
    real = draws(60, 3)
    found = precision_recall(real.flip(0), real)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_sets_that_do_not_meet_have_neither():
    found = precision_recall(draws(50, 3) + 100, draws(60, 3))
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_a_student_that_collapsed_is_precise_and_recalls_little():
    real = draws(300, 2)
    found = precision_recall(0.05 * draws(300, 2), real)
    assert found.precision > 0.95
    assert found.recall < 0.1 and found.coverage < 0.2


def test_a_student_that_scatters_recalls_more_than_it_is_precise():
    found = precision_recall(6 * draws(300, 2), draws(300, 2))
    assert found.recall > 0.8 > 0.4 > found.precision


def test_exchanging_the_sets_exchanges_precision_and_recall():
    a, b = draws(40, 2), 2 * draws(55, 2)
    forth, back = precision_recall(a, b), precision_recall(b, a)
    assert (forth.precision, forth.recall) == (back.recall, back.precision)


def test_a_draw_of_the_same_distribution_has_density_and_coverage_near_their_expectations():
    """Density 1; coverage 1 - (1/2)^k of equal numbers (arXiv 2002.09797, section 3.3)."""
    found = precision_recall(draws(1500, 2), draws(1500, 2), neighbours=3)
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.coverage == pytest.approx(1 - 0.5**3, abs=0.04)


def test_it_is_what_the_definition_says_pair_by_pair(monkeypatch):
    fake, real = draws(11, 2), draws(9, 2)

    def reach(rows):
        return [sorted((row - other).norm().item() for other in rows)[2] for row in rows]

    real_reach, fake_reach = reach(real), reach(fake)
    in_real = [[(x - y).norm().item() <= r for y, r in zip(real, real_reach, strict=True)] for x in fake]
    in_fake = [[(x - y).norm().item() <= r for y, r in zip(fake, fake_reach, strict=True)] for x in real]
    monkeypatch.setattr(manifold, "ROWS", 4)
    found = precision_recall(fake, real, neighbours=2)
    assert found.precision == pytest.approx(sum(map(any, in_real)) / 11)
    assert found.recall == pytest.approx(sum(map(any, in_fake)) / 9)
    assert found.density == pytest.approx(sum(map(sum, in_real)) / 11 / 2)
    assert found.coverage == pytest.approx(sum(map(any, zip(*in_real, strict=True))) / 9)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_has_no_neighbours_is_refused():
    with pytest.raises(ValueError, match=r"neighbours must lie between 1 and .* got 3 of 3 and 60"):
        precision_recall(draws(3, 2), draws(60, 2))
    with pytest.raises(ValueError, match="one width, got 2 and 3"):
        precision_recall(draws(9, 2), draws(9, 3))
    with pytest.raises(ValueError, match="samples: 1 of 9 samples"):
        precision_recall(torch.cat([draws(8, 2), torch.full((1, 2), torch.nan)]), draws(9, 2))
