"""Estimates: means, paired differences and ratios agree with scipy and with the textbook."""

import math

import numpy as np
import pytest
from scipy import stats

from kdlm.estimates import Estimate, finite, jackknife, mean, paired, ratio, written


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


@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_differences_are_no_more_certain_than_a_sign_test_finds(count):
    assert paired([1.0] * count, [0.5] * count).p_value == pytest.approx(stats.binomtest(count, count).pvalue)


def test_one_pair_is_never_significant():
    for found in (paired([2.0], [1.0]), ratio([2.0], [1.0]), ratio([], []), mean([])):
        assert math.isnan(found.p_value) and all(map(math.isnan, found.interval()))


def test_an_infinite_reading_has_no_error():
    assert mean([1.0, math.inf]).value == math.inf and math.isnan(mean([1.0, math.inf]).error)
    assert ratio([1.0, math.inf], [1.0, 1.0]).as_json() == {"value": None, "error": None}


@pytest.mark.parametrize(
    ("value", "reach", "said"),
    [
        (4.72034, 0.01234, "4.720 ± 0.012"),
        (0.5, None, "0.5"),
        (0.5, 0.0, "0.5 ± 0"),
        (1234.5, 67.8, "1234 ± 68"),
        (4.72034, 1.2e-9, "4.7203 ± 1e-09"),
        (-0.25, 3.0, "-0.2 ± 3.0"),
        (math.nan, 0.1, "-"),
        (math.inf, math.nan, "-"),
        (None, None, "-"),
    ],
)
def test_a_figure_is_written_in_the_digits_that_its_error_bears(value, reach, said):
    assert written(value, reach) == said


def test_json_holds_no_number_that_is_not_finite():
    assert [finite(value) for value in (1, np.float32(0.5), True, "1", None, math.nan, -math.inf)] == [
        1.0,
        0.5,
        *[None] * 5,
    ]
