"""Parts of the rows: RS2's, one an epoch, and one for the run."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kdlm.data import TensorRows
from kdlm.losses import AnyLoss
from kdlm.samplers import FixedSubset, RepeatedSubsets, tied

LOSSES = TypeAdapter(list[AnyLoss])


def scored(count: int) -> list[dict[str, Any]]:
    return [{"score": float(n % 10), "domain": n % 3 == 0, "labels": n % 2} for n in range(count)]


@given(st.integers(1, 60), st.floats(0.05, 1), st.integers(0, 3), st.integers(1, 12))
def test_without_replacement_no_row_comes_again_before_every_other_has_come(count, fraction, seed, epochs):
    order = RepeatedSubsets(fraction=fraction).order(range(count), seed)
    drawn = [row for epoch in range(epochs) for row in order.rows(epoch).tolist()]
    assert len(drawn) == epochs * len(order) == epochs * max(1, round(fraction * count))
    for end in range(len(drawn)):
        seen = Counter(drawn[: end + 1])
        assert max(seen.values()) - (min(seen.values()) if len(seen) == count else 0) <= 1


def test_every_row_is_seen_exactly_once_in_so_many_epochs_as_the_fraction_goes_into_one():
    order = RepeatedSubsets(fraction=0.25).order(range(40), 5)
    for start in (0, 4, 8):
        drawn = np.concatenate([order.rows(epoch) for epoch in range(start, start + 4)])
        assert sorted(drawn) == [*range(40)]
    assert not np.array_equal(order.rows(0), order.rows(4)), "the permutation is drawn anew"


def test_the_whole_is_ordinary_training_and_an_order_is_decided_by_its_seed_and_epoch_alone():
    whole = RepeatedSubsets(fraction=1.0).order(range(30), 1)
    assert all(sorted(whole.rows(epoch)) == [*range(30)] for epoch in range(3))
    again = RepeatedSubsets(fraction=1.0).order(range(30), 1)
    assert np.array_equal(again.rows(2), whole.rows(2)), "epochs before it were not asked for"
    other = RepeatedSubsets(fraction=1.0).order(range(30), 2)
    assert not np.array_equal(other.rows(2), whole.rows(2))


def test_with_replacement_an_epoch_has_no_row_twice_and_knows_nothing_of_the_one_before():
    order = RepeatedSubsets(fraction=0.5, replacement=True).order(range(100), 0)
    first, second = set(order.rows(0).tolist()), set(order.rows(1).tolist())
    assert len(first) == len(second) == 50 and first & second


@pytest.mark.parametrize(("keep", "least", "most"), [("highest", 8, 9), ("lowest", 0, 1)])
def test_a_scored_part_holds_that_end_of_the_scores_and_its_size(keep, least, most):
    rows = scored(100)
    kept = FixedSubset(fraction=0.2, by="score", keep=keep).kept(rows)
    assert len(kept) == 20 and {rows[n]["score"] for n in kept} == {least, most}


def test_equal_scores_are_chosen_among_by_the_seed_and_not_by_their_place():
    rows = [{"score": 1.0} for _ in range(50)]
    kept = [FixedSubset(fraction=0.2, by="score", seed=seed).kept(rows) for seed in (0, 0, 1)]
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])
    assert not np.array_equal(kept[0], range(10))


@pytest.mark.parametrize("by", [None, "score"])
def test_a_balanced_part_keeps_the_share_of_every_class(by):
    rows = scored(90)
    kept = FixedSubset(fraction=0.4, by=by, balance="domain").kept(rows)
    assert [sum(rows[n]["domain"] == value for n in kept) for value in (True, False)] == [12, 24]


def test_images_are_chosen_from_by_their_classes_too():
    rows = TensorRows({"labels": torch.arange(20) % 4, "pixel_values": torch.zeros(20, 1)})
    kept = FixedSubset(fraction=0.5, balance="labels").kept(rows)
    assert Counter((kept % 4).tolist()) == dict.fromkeys(range(4), 2)  # of 5 each


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (FixedSubset(fraction=0.5, by="forgetting"), "sampler.by: the training rows have no column 'forgetting'"),
        (FixedSubset(fraction=0.5, balance="pieces"), "sampler.balance: column 'pieces' .* several values in a row"),
        (FixedSubset(fraction=0.5, by="bad"), "sampler.by: bad is not a finite number in every row"),
    ],
)
def test_a_column_that_cannot_choose_is_named(section, said):
    rows = [{"score": 1.0, "pieces": [1, 2], "bad": float("nan")} for _ in range(4)]
    with pytest.raises(ValueError, match=said):
        section.kept(rows)


@pytest.mark.parametrize(("fraction", "share"), [(0.1, 0.95), (0.5, 0.75), (1.0, 0.5)])
def test_losses_are_tied_to_the_fraction_and_without_a_tie_left_alone(fraction, share):
    losses = LOSSES.validate_python([{"name": "forward_kl", "weight": 2.0}, {"name": "cross_entropy"}])
    found = tied(losses, FixedSubset(fraction=fraction, tie=0.5))
    assert [loss.weight for loss in found] == pytest.approx([2 * share, 1 - share])
    assert tied(losses, FixedSubset(fraction=fraction)) == losses == tied(losses, None)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([{"name": "forward_kl"}], "one of each"),
        (
            [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": {"name": "linear", "start": 1, "end": 0}}],
            "the weight of cross_entropy is a schedule",
        ),
    ],
)
def test_losses_that_cannot_be_tied_are_refused(losses, said):
    with pytest.raises(ValueError, match=said):
        tied(LOSSES.validate_python(losses), FixedSubset(fraction=0.5, tie=1.0))
