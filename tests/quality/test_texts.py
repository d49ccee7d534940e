"""Figures of completions: counted by hand, and by scikit-learn's n-grams."""

import pytest
from sklearn.feature_extraction.text import CountVectorizer

from kdlm.quality import distinct, repetition, text_figures


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_counts_the_n_grams_that_scikit_learn_finds(n):
    completions = [[5, 5, 7, 5, 5, 7], [7, 5], [], [3, 5, 7]]
    counter = CountVectorizer(ngram_range=(n, n), tokenizer=str.split, token_pattern=None)
    counts = counter.fit_transform(" ".join(map(str, one)) for one in completions)
    assert distinct(completions, n) == counts.shape[1] / counts.sum()


def test_nothing_written_is_not_varied_and_not_repeated():
    assert distinct([], 1) == distinct([[], [4]], 2) == 0.0
    assert repetition([]) == repetition([1, 1, 1]) == 0.0
    assert text_figures([], []) == {}
    assert text_figures([[]], [False]) == dict.fromkeys(
        ("length", "truncated", "repetition_4", "distinct_1", "distinct_2"), 0.0
    )


def test_n_grams_do_not_cross_from_one_completion_to_the_next():
    assert distinct([[1, 2], [1, 2]], 2) == 0.5
    assert distinct([[1], [2], [1]], 2) == 0.0


def test_a_loop_repeats_itself_and_different_tokens_do_not():
    assert repetition(list(range(20))) == 0.0
    assert repetition([1, 2] * 10) == pytest.approx(1 - 2 / 17)


def test_means_are_over_completions():
    found = text_figures([[1, 2, 3], [1]], [True, False])
    assert found == {"length": 2.0, "truncated": 0.5, "repetition_4": 0.0, "distinct_1": 0.75, "distinct_2": 1.0}
