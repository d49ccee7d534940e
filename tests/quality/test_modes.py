import math

import pytest
import torch

from kdlm.quality import mode_report

ANGLES = torch.arange(8) * (math.pi / 4)
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
WEIGHTS = torch.tensor([0.2, 0.05, 0.125, 0.125]).repeat(2)
STD = 0.15


def ring(n: int, weights: torch.Tensor = WEIGHTS) -> torch.Tensor:
    return CENTRES[torch.multinomial(weights, n, replacement=True)] + STD * torch.randn(n, 2)


def test_draws_from_the_ring_itself_are_good_and_cover_it():
    n = 5_000
    report = mode_report(ring(n), CENTRES, STD, WEIGHTS)
    expected = 1 - math.exp(-4.5)
    assert report.good == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))
    assert report.modes == 8
    noise = (WEIGHTS * (1 - WEIGHTS)).sqrt().sum().item() * 0.4 / math.sqrt(n)
    assert 0.2 * noise < report.tv < 2.5 * noise


def test_a_collapsed_student_is_good_on_the_modes_it_has():
    some = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    report = mode_report(ring(2_000, some), CENTRES, STD, WEIGHTS)
    assert report.good > 0.97 and report.modes == 2
    assert report.tv == pytest.approx(1 - 0.2 - 0.125, abs=0.01)


def test_a_mode_with_less_than_a_tenth_of_its_weight_is_lost():
    few = [CENTRES[:1].repeat(99, 1), CENTRES[1:2]]
    assert mode_report(torch.cat(few), CENTRES[:2], STD, torch.tensor([0.92, 0.08])).modes == 2
    assert mode_report(torch.cat(few), CENTRES[:2], STD, torch.tensor([0.8, 0.2])).modes == 1


def test_points_between_the_modes_are_not_good():
    report = mode_report(0.1 * torch.randn(200, 2), CENTRES, STD)
    assert (report.good, report.modes) == (0, 0)


def test_weights_need_not_sum_to_one_and_are_equal_when_left_out():
    points = ring(300)
    assert mode_report(points, CENTRES, STD) == mode_report(points, CENTRES, STD, torch.full((8,), 7.0))


@pytest.mark.usefixtures("unchecked_shapes")
def test_modes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="std must be above 0, got 0"):
        mode_report(ring(9), CENTRES, 0)
    with pytest.raises(ValueError, match="weights must be 8 numbers"):
        mode_report(ring(9), CENTRES, STD, torch.ones(7))
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        mode_report(torch.randn(9, 3), CENTRES, STD)
