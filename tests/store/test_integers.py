"""Columns of whole numbers come back as they were, and damage is noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlm.store.integers import Unpacker, from_gaps, gaps, pack

columns = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=50), max_size=4)


@given(columns)
def test_columns_come_back_as_they_were(given_columns: list[list[int]]) -> None:
    reader = Unpacker(pack([np.array(column, dtype=np.int64) for column in given_columns]))
    for column in given_columns:
        assert reader.column(len(column)).tolist() == column


@given(st.lists(st.sets(st.integers(0, 200_000), min_size=5, max_size=5), min_size=1, max_size=8))
def test_gaps_come_back_as_the_ids(rows: list[set[int]]) -> None:
    ids = np.array([sorted(row) for row in rows])
    left_out = gaps(ids)
    assert (left_out >= 0).all() and np.array_equal(from_gaps(left_out.astype(np.uint32)), ids)


def test_a_column_that_ends_early_is_an_error() -> None:
    packed = pack([np.arange(1000)])
    for cut in (0, 1, 3, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ValueError, match="ends early or is damaged"):
            Unpacker(packed[:cut]).column(1000)


def test_a_column_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="damaged"):
        Unpacker(pack([np.arange(300)])).column(200)


def test_sorted_ids_of_a_large_vocabulary_take_about_their_entropy() -> None:
    """log2 C(151936, 128) is 186 bytes; DistillKit's 18 bits an id are 288."""
    rows = [np.sort(np.random.default_rng(row).choice(151_936, 128, replace=False)) for row in range(256)]
    assert len(pack([gaps(np.array(rows))])) / 256 < 186 * 1.04
