"""Packing loses nothing, cuts nothing and fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlm.data.packing import best_fit, packed_row


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_sequence_is_in_exactly_one_bin_that_holds_it(lengths):
    bins = best_fit(lengths, 20)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= 20 for members in bins)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_no_two_bins_would_fit_into_one(lengths):
    totals = sorted(sum(lengths[i] for i in members) for members in best_fit(lengths, 20))
    assert len(totals) < 2 or totals[0] + totals[1] > 20


def test_the_fullest_bin_with_room_is_taken():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([], 10) == []


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="11 tokens does not fit a packed row of 10"):
        best_fit([3, 11], 10)


def test_a_packed_row_says_where_its_sequences_are():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "index": 7},
        {"input_ids": [4], "labels": [-100], "index": 2},
    ]
    row = packed_row(rows)
    assert row["input_ids"].tolist() == [1, 2, 3, 4] and row["labels"].tolist() == [-100, 2, 3, -100]
    assert (row["seq_lengths"], row["index"], row["length"]) == ([3, 1], [7, 2], 4)
