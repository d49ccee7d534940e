"""PACED: weights by pass rates, right in the mean whatever the number of attempts."""

from math import comb

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Paced, Verify
from kdlm.curation.paced import expected_weight
from kdlm.rollouts import PassRate


def weight_of(rate: PassRate, a: float = 1.0, b: float = 1.0, prior: float | None = None) -> float:
    found = expected_weight(rate, a, b, prior)
    assert found is not None
    return found


def mean_over_attempts(p: float, attempts: int, a: int, b: int) -> float:
    chances = [comb(attempts, s) * p**s * (1 - p) ** (attempts - s) for s in range(attempts + 1)]
    return sum(chance * weight_of(PassRate(s, attempts), a, b, None) for s, chance in enumerate(chances))


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 1), (1, 3), (0, 1)])
@pytest.mark.parametrize("attempts", [4, 5, 8])
def test_without_a_prior_the_weight_is_unbiased_whatever_the_number_of_attempts(a, b, attempts):
    for p in (0.0, 0.1, 0.5, 0.83, 1.0):
        assert mean_over_attempts(p, attempts, a, b) == pytest.approx(p**a * (1 - p) ** b, abs=1e-12)


@pytest.mark.parametrize("attempts", [2, 4, 9])
def test_for_a_b_1_it_is_the_plain_weight_times_k_over_k_minus_1(attempts):
    for solved in range(attempts + 1):
        p = solved / attempts
        want = attempts / (attempts - 1) * p * (1 - p)
        assert weight_of(PassRate(solved, attempts), prior=None) == pytest.approx(want)


def test_the_plain_weight_is_that_of_many_attempts_and_largest_at_a_of_a_plus_b():
    many = 10_000
    for a, b in ((1.0, 1.0), (2.0, 1.0), (0.5, 1.5)):
        weights = [weight_of(PassRate(s, many), a, b, 0.5) for s in range(0, many + 1, 100)]
        for place, weight in enumerate(weights):
            assert weight == pytest.approx((place / 100) ** a * (1 - place / 100) ** b, abs=1e-2)
        assert weights.index(max(weights)) == pytest.approx(100 * a / (a + b), abs=1)


@pytest.mark.parametrize("prior", [None, 0.5, 1.0])
def test_it_is_symmetric_for_a_equal_to_b_and_uniform_at_0(prior):
    for solved in range(9):
        one, other = (weight_of(PassRate(s, 8), 2, 2, prior) for s in (solved, 8 - solved))
        assert one == pytest.approx(other)
        assert weight_of(PassRate(solved, 8), 0, 0, prior) == pytest.approx(1)


def test_a_prior_keeps_alive_what_was_never_or_always_solved_and_less_the_more_attempts():
    assert weight_of(PassRate(0, 8), prior=None) == 0
    never = [weight_of(PassRate(0, k), prior=0.5) for k in (1, 4, 16, 64)]
    assert min(never) > 0 and never == sorted(never, reverse=True)
    # Beta(1, 1): p^ is (s + 1) / (K + 2), and E[p (1 - p)] = p^ (1 - p^) (K + 2) / (K + 3)
    p = 1 / 10
    assert weight_of(PassRate(0, 8), prior=1.0) == pytest.approx(p * (1 - p) * 10 / 11)


def rows(**columns) -> Dataset:
    return Dataset.from_dict({"prompt": [f"p{n}" for n in range(len(next(iter(columns.values()))))], **columns})


def test_rows_get_weights_of_mean_1_and_keep_their_other_columns():
    given = rows(solved=[0, 4, 8, 2], attempts=[8] * 4, answer=list("abcd"))
    desk = Desk()
    found = Paced(prior=0.5).run(given, desk)
    weights = found["weight"][:]
    assert (
        sum(weights) / 4 == pytest.approx(1) and weights[1] == max(weights) and weights[0] == pytest.approx(weights[2])
    )
    assert found["answer"][:] == list("abcd")
    assert desk.counts.figures == {
        "rows of prompts solved always": 1, "rows of prompts solved never": 1, "rows of prompts solved sometimes": 2,
    }  # fmt: skip
    raw = Paced(prior=0.5, normalise=False)(given)["weight"][:]
    assert [w / raw[1] for w in raw] == pytest.approx([w / weights[1] for w in weights])


def test_rows_without_attempts_or_with_too_few_are_left_out_and_counted():
    desk = Desk()
    found = Paced().run(rows(solved=[1, None, 1, 0], attempts=[2, 2, 1, 0]), desk)
    assert found["prompt"][:] == ["p0"]
    assert desk.counts.kinds["too few attempts to weigh by"].count == 3


def test_attempts_that_were_cut_count_as_verify_says_and_a_prompt_without_any_has_the_weight_of_the_prior():
    stop, answer = ["end", "length", "length"], ["4"] * 3
    attempts = rows(prompt_id=list("xxx"), completion=["4", "4", "5"], stop=stop, answer=answer)
    for truncated, solved, of in (("attempt", 2, 3), ("leave_out", 1, 1)):
        step = Verify.model_validate({"verifier": {"name": "exact", "column": "answer"}, "truncated": truncated})
        judged = step(attempts)
        (weight,) = set(Paced(prior=0.5, normalise=False)(judged)["weight"][:])
        assert weight == pytest.approx(weight_of(PassRate(solved, of), prior=0.5))
    desk = Desk()
    (weight,) = Paced(prior=0.5, normalise=False).run(rows(solved=[0], attempts=[0]), desk)["weight"][:]
    assert desk.counts.figures == {"rows of prompts never tried": 1}
    assert weight == pytest.approx(0.5 * 0.5 / (1 * 2))  # E[p (1 - p)] under Beta(1/2, 1/2)


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"prior: null wants whole a and b, got 0\.5 and 1"):
        Paced(a=0.5)
    with pytest.raises(ValueError, match="paced: no column 'solved'"):
        Paced()(rows(attempts=[1]))
