"""So many rows are kept: of each value, evenly, or of all; which ones does not depend on the order of the rows."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import ValidationError

from kdlm.curation import Desk, Filter, Select

ROWS = Dataset.from_list(
    [
        {"prompt_id": key, "level": len(key), "completion": "x" * length, "score": score}
        for key, length, score in [("a", 5, 0.1), ("a", 3, 0.9), ("a", 9, None), ("bb", 4, 0.5), ("bb", 2, 0.7)]
    ]
)


def scores(**asked) -> list[float | None]:
    return Select(**asked)(ROWS)["score"]


def test_the_first_the_highest_and_the_lowest_of_each_prompt():
    assert scores(count=1, of_each="prompt_id") == [0.1, 0.5]
    assert scores(count=1, of_each="prompt_id", order="highest", by="score") == [0.9, 0.7]
    assert scores(count=1, of_each="prompt_id", order="lowest", by="score") == [0.1, 0.5]
    assert scores(count=2, of_each="prompt_id", order="highest", by="score") == [0.1, 0.9, 0.5, 0.7]


def test_text_counts_by_its_length():
    assert scores(count=2, order="lowest", by="completion") == [0.9, 0.7]
    assert scores(count=1, order="highest", by="completion") == [None]


def test_a_share_is_of_all_rows_or_of_each_value():
    assert scores(share=0.4, order="highest", by="score") == [0.9, 0.7]
    assert scores(share=0.01) == [0.1]
    assert len(scores(share=0.5, of_each="prompt_id")) == 3
    assert scores(share=1) == ROWS["score"]


@settings(deadline=None, max_examples=30)
@given(some.lists(some.integers(0, 3), min_size=1, max_size=30), some.integers(1, 30))
def test_balanced_values_differ_by_one_at_most_unless_one_has_no_more(levels, count):
    rows = Dataset.from_dict({"level": levels})
    chosen, there = Counter(Select(count=count, balanced="level")(rows)["level"]), Counter(levels)
    assert chosen.total() == min(count, len(levels))
    most = max(chosen.values())
    assert all(chosen[level] >= min(most - 1, there[level]) for level in there)


@settings(deadline=None, max_examples=30)
@given(some.permutations(range(12)), some.integers(0, 5))
def test_random_rows_are_the_same_in_whatever_order_rows_come(order, seed):
    rows = Dataset.from_dict({"prompt": [f"{number}" for number in range(12)]})
    step = Select(count=4, order="random")
    chosen = step.run(rows, Desk(seed=seed))["prompt"]
    assert set(step.run(rows.select(order), Desk(seed=seed))["prompt"]) == set(chosen)
    assert len(set(chosen)) == 4
    again = step.run(rows.select(list(map(int, chosen))), Desk(seed=seed))
    assert again["prompt"] == chosen


def test_another_seed_draws_other_rows():
    rows = Dataset.from_dict({"prompt": [f"{number}" for number in range(100)]})
    step = Select(count=10, order="random")
    assert step.run(rows, Desk(seed=0))["prompt"] != step.run(rows, Desk(seed=1))["prompt"]


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({}, "give count or share"),
        ({"count": 1, "share": 0.5}, "give count or share"),
        ({"count": 1, "of_each": "a", "balanced": "b"}, "give of_each or balanced"),
        ({"count": 1, "order": "highest"}, "needs `by`"),
        ({"count": 1, "by": "score"}, "remove `by`"),
    ],
)
def test_what_means_nothing_is_refused(asked, fault):
    with pytest.raises(ValidationError, match=fault):
        Select(**asked)


def test_no_rows_stay_no_rows():
    none = Select(count=3, balanced="level", order="highest", by="score")(ROWS.select([]))
    assert len(none) == 0
    assert none.features == ROWS.features


@pytest.mark.parametrize("order", ["highest", "lowest"])
def test_what_is_no_number_comes_last(order):
    rows = Dataset.from_dict({"n": [float("nan"), 1.0, None, 5.0, float("nan"), 3.0]})
    assert sorted(Select(order=order, by="n", count=3)(rows)["n"]) == [1, 3, 5]
    assert Filter.model_validate({"where": [{"column": "n", "at_most": 4}]})(rows)["n"][:] == [1, 3]


def test_a_column_without_a_size_is_named():
    rows = Dataset.from_dict({"when": [{"year": 2026}]})
    with pytest.raises(ValueError, match="column 'when': dict has no size: expected numbers, text or lists"):
        Select(order="highest", by="when", count=1)(rows)
    with pytest.raises(ValueError, match="column 'when': dict has no size"):
        Filter.model_validate({"where": [{"column": "when", "at_most": 4}]})(rows)
