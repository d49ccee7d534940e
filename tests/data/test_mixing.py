"""Shares are kept at every point of a mix, and a split depends on content and seed alone."""

from itertools import islice

import numpy as np
import pytest

from kdlm.data.mixing import held_out, mixed


def numbers(source, size):
    return lambda: iter([(source, i) for i in range(size)])


def test_without_weights_sources_follow_one_another():
    assert list(mixed([numbers("a", 2), numbers("b", 1)], None, "all_exhausted")) == [("a", 0), ("a", 1), ("b", 0)]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 2.0, 4.0, 8.0]])
def test_each_source_has_its_share_after_any_number_of_rows(weights):
    sources = [numbers(i, 10_000) for i in range(len(weights))]
    taken = np.zeros(len(weights))
    shares = np.array(weights) / sum(weights)
    for count, (source, _) in enumerate(islice(mixed(sources, weights, "first_exhausted"), 500), 1):
        taken[source] += 1
        assert (abs(taken - shares * count) <= 1.5).all()


def test_a_mix_ends_with_the_first_source_or_repeats_until_the_last():
    sources = [numbers("a", 2), numbers("b", 6)]
    first = list(mixed(sources, [1.0, 1.0], "first_exhausted"))
    assert len(set(first)) == len(first) and {("a", 0), ("a", 1)} <= set(first)
    every = list(mixed(sources, [1.0, 1.0], "all_exhausted"))
    assert set(every) == {("a", 0), ("a", 1), *(("b", i) for i in range(6))}
    assert every.count(("b", 0)) == 1 and every.count(("a", 0)) >= 3


KEYS = np.array([5, 5, -3, 8, 8, 8, 11, 2, 40, 7])


def test_a_split_ignores_the_order_of_rows_and_keeps_pieces_together():
    out = held_out(KEYS, 3, seed=0)
    chosen = set(KEYS[out])
    assert len(chosen) == 3 and not chosen & set(KEYS[~out])
    order = np.random.default_rng(0).permutation(len(KEYS))
    assert set(KEYS[order][held_out(KEYS[order], 3, seed=0)]) == chosen
    assert any(set(KEYS[held_out(KEYS, 3, seed=seed)]) != chosen for seed in range(1, 5))


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="holding out 7 of 7 distinct rows"):
        held_out(KEYS, 7, seed=0)
