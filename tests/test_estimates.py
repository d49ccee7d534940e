"""Estimates: means, paired differences and ratios agree with scipy and with the textbook."""

import math

import numpy as np
import pytest
from scipy import stats

from kdlm.estimates import Estimate, jackknife, mean, paired, ratio


def test_a_mean_has_the_standard_error_and_interval_of_scipy():
    values = [1.0, 2.5, 3.0, 7.0]
    found = mean(values)
    assert found.error == pytest.approx(stats.sem(values))
    assert found.interval() == pytest.approx(stats.t.interval(0.95, 3, np.mean(values), stats.sem(values)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_one_reading_has_no_error_and_none_has_no_value():
    assert math.isnan(mean([2.0]).error) and mean([2.0]).value == 2.0
    assert math.isnan(mean([]).value)


def test_paired_readings_are_compared_as_scipy_does():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 20))
    assert paired(ours, theirs).p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired([1, 2], [1, 2, 3])


def test_equal_readings_differ_by_nothing_for_certain():
    assert paired([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert Estimate(1.0, 0.0).p_value == 0.0


def test_a_ratio_of_texts_of_one_length_is_their_mean():
    sums = [3.0, 5.0, 4.0, 9.0]
    found, plain = ratio(sums, [2.0] * 4), mean([value / 2 for value in sums])
    assert (found.value, found.error) == pytest.approx((plain.value, plain.error))


def test_the_error_of_a_ratio_is_how_far_it_strays():
    generator = np.random.default_rng(1)

    def draw() -> Estimate:
        counts = generator.integers(5, 50, size=60)
        return ratio(counts * generator.normal(2.0, 0.5, size=60), counts)

    drawn = [draw() for _ in range(400)]
    assert np.mean([each.error for each in drawn]) == pytest.approx(np.std([each.value for each in drawn]), rel=0.15)


def test_a_jackknife_of_one_row_has_no_error():
    assert math.isnan(jackknife(np.ones((1, 1)), lambda total: total[0]).error)
