"""Bands: what K attempts can know of a probability."""

import pytest

from kdlm.rollouts import PassRate


@pytest.mark.parametrize("attempts_at", [1, 4, 8, 64])
def test_never_in_k_attempts_bounds_a_probability_by_about_three_over_k(attempts_at):
    low, high = PassRate(0, attempts_at).interval()
    assert low == 0.0 and high == pytest.approx(1 - 0.05 ** (1 / attempts_at))
    assert high < 3 / attempts_at
    assert PassRate(attempts_at, attempts_at).interval() == pytest.approx((1 - high, 1.0))


def test_an_interval_holds_its_level_whatever_the_probability():
    """Exact, so never less than the level: summed over all that K attempts may give."""
    from scipy.stats import binom

    rates = [PassRate(solved, 8) for solved in range(9)]
    for p in (0.02, 0.1, 0.35, 0.5, 0.8, 0.97):
        inside = sum(binom.pmf(r.solved, 8, p) for r in rates if r.interval()[0] <= p <= r.interval()[1])
        assert inside >= 0.90  # both tails of 0.05 where an end is one-sided
