"""Bands: a three-way split of prompts by their attempts, and what K attempts can know of a probability."""

import random

import pytest

from kdlm.rollouts import Completion, PassRate, Written, banded


def attempts(groups: list[list[float | None]], stop: str = "end") -> list[Written]:
    return [
        Written({"index": n}, [1], Completion([2], [0.0], stop, n), f"{n}: {place}", reward)  # type: ignore[arg-type]
        for n, group in enumerate(groups)
        for place, reward in enumerate(group)
    ]


def test_the_split_is_a_partition_and_no_unverified_attempt_enters():
    draw = random.Random(0)
    groups: list[list[float | None]] = [[draw.choice([0.0, 0.5, 1.0, 1.0]) for _ in range(4)] for _ in range(200)]
    written = attempts(groups)
    shuffled = sorted(written, key=lambda one: draw.random())
    bands = banded(shuffled, success=1.0)
    names = [rate.band for rate in bands.rates]
    assert len(names) == 200 and set(names) == {"always", "sometimes", "never"}
    for number, (group, rate) in enumerate(zip(groups, bands.rates, strict=True)):
        solved = sum(reward == 1.0 for reward in group)
        assert (rate.solved, rate.attempts) == (solved, 4)
        assert (number in bands.never) == (solved == 0)
        assert (number in {one.completion.group for one in bands.own}) == (0 < solved < 4)
    assert all(one.reward == 1.0 for one in bands.own)
    assert len(bands.own) == sum(rate.solved for rate in bands.rates if rate.band == "sometimes")
    half = banded(written, success=0.5)
    assert len(half.never) < len(bands.never)


def test_traces_are_different_ended_by_themselves_and_at_most_so_many():
    written = attempts([[1.0, 1.0, 1.0, 0.0], [1.0] * 3 + [1.0]])
    for one, text in zip(written[:3], ("b", "a", "b"), strict=True):
        one.__dict__["text"] = text
    assert [one.text for one in banded(written).own] == ["b", "a"]
    assert [one.text for one in banded(written, most=1).own] == ["b"]
    assert banded(attempts([[1.0, 0.0]], stop="length")).own == []
    assert banded([]).rates == []


def test_an_attempt_that_nothing_judged_and_a_prompt_without_one_are_refused():
    with pytest.raises(ValueError, match="prompt 1: an attempt that nothing has judged"):
        banded(attempts([[1.0], [None]]))
    with pytest.raises(ValueError, match="prompt 0: no attempt at it"):
        banded(attempts([[1.0], [0.0]])[1:])


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
