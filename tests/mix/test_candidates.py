"""Mixtures that are drawn: on the simplex, within what the sources can give, around their sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlm.mix.candidates import drawn, limited
from kdlm.mix.sections import Candidates

SIZES = st.lists(st.floats(10, 1e6), min_size=2, max_size=7).map(np.array)


@given(SIZES, st.floats(0.05, 3.9), st.integers(0, 3))
def test_mixtures_add_up_to_one_and_obey_their_limits(sizes, passes, seed):
    section = Candidates(least=1e-6)
    samples = passes * sizes.sum()
    found = drawn(50, sizes, samples, section, np.random.default_rng(seed))
    assert found.sum(1) == pytest.approx(np.ones(50), abs=1e-9)
    assert (found >= section.least - 1e-12).all()
    assert (found * samples <= section.most * sizes * (1 + 1e-9)).all()


def test_what_is_within_its_limits_is_left_alone():
    weights = np.array([[0.2, 0.3, 0.5], [0.05, 0.9, 0.05]])
    assert limited(weights, np.ones(3), 0.01) == pytest.approx(weights, abs=1e-15)


def test_candidates_do_not_depend_on_the_order_of_the_sources_in_law():
    section, sizes = Candidates(), np.array([100.0, 1000.0, 10000.0])
    means = [
        drawn(20000, sizes[order], 10.0, section, np.random.default_rng(0)).mean(0)[np.argsort(order)]
        for order in (np.array([0, 1, 2]), np.array([2, 0, 1]))
    ]
    assert means[0] == pytest.approx(means[1], abs=0.01)
    centre = sizes**0.7 / (sizes**0.7).sum()
    assert means[0] == pytest.approx(centre, abs=0.02), "the mean is the sizes, tempered"


def test_sources_that_are_too_small_for_the_run_are_said():
    with pytest.raises(ValueError, match=r"candidates\.most: 4 times 30 sequences are less than the 200"):
        drawn(3, np.array([10.0, 20.0]), 200, Candidates(), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"candidates\.least"):
        drawn(3, np.array([10.0, 2e6]), 1e6, Candidates(least=0.01), np.random.default_rng(0))
