"""DDK: shares of domains from gaps, and the rows that they draw."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlm.samplers import DomainGaps, DomainOrder, next_shares
from kdlm.samplers.ddk import gaps_of

GAPS = st.lists(st.floats(0.1, 1e6), min_size=2, max_size=6)


def order(sizes=(40, 10), every=5, per_step=4, held_out=3, **options) -> DomainOrder:
    rows = [{"domain": number, "index": n} for number, size in enumerate(sizes) for n in range(size)]
    return DomainGaps(every=every, held_out=held_out, **options).order(rows, 0, per_step)


@given(GAPS, st.floats(0, 1), st.integers(0, 5))
def test_shares_add_up_and_no_domain_dies(gaps, smoothing, times):
    shares = np.full(len(gaps), 1 / len(gaps))
    for _ in range(times + 1):
        shares = next_shares(shares, np.array(gaps), smoothing)
        assert shares.sum() == pytest.approx(1)
        assert (shares >= smoothing / len(gaps) - 1e-12).all()


@given(st.floats(0.1, 1e6), st.integers(2, 6))
def test_equal_gaps_keep_even_shares_even_and_bring_others_back(gap, count):
    even = np.full(count, 1 / count)
    assert next_shares(even, np.full(count, gap), 0.5) == pytest.approx(even)
    shares = np.array([0.7, *([0.3 / (count - 1)] * (count - 1))])
    for before, after in pairwise([shares := next_shares(shares, np.full(count, gap), 0.5) for _ in range(4)]):
        assert abs(after - even).max() < abs(before - even).max() + 1e-15


def test_a_wider_gap_raises_the_share_of_its_domain_at_the_cost_of_the_others():
    shares, gaps = np.array([0.2, 0.3, 0.5]), np.array([1.2, 1.5, 1.1])
    wider = gaps + np.array([0, 0.4, 0])
    before, after = next_shares(shares, gaps, 0.5), next_shares(shares, wider, 0.5)
    assert after[1] > before[1] and after[0] < before[0] and after[2] < before[2]


def test_shares_are_those_of_the_paper():
    shares = next_shares(np.array([0.25, 0.75]), np.array([2.0, 1.0]), smoothing=0.4)
    psi = np.array([0.25 * np.e**2, 0.75 * np.e])
    assert shares == pytest.approx(0.6 * psi / psi.sum() + 0.2)


def test_a_hopeless_student_does_not_overflow_and_one_that_is_no_number_is_said():
    gaps = gaps_of(np.array([5000.0, 1.0]), np.array([1.0, 1.0]))
    assert next_shares(np.array([0.5, 0.5]), gaps, 0.5) == pytest.approx([0.75, 0.25])
    with pytest.raises(ValueError, match="nats a token by domain"):
        gaps_of(np.array([np.nan, 1.0]), np.array([1.0, 1.0]))


def test_an_epoch_has_each_domain_by_its_share_and_no_stretch_of_it_is_far_off():
    drawn = order(every=25)
    drawn.shares = np.array([0.3, 0.7])
    which = drawn.plan()
    assert len(which) == len(drawn) == 100 and (which == 0).sum() == 30
    for end in range(1, 100):
        assert abs((which[:end] == 0).sum() - 0.3 * end) <= 1


def test_a_domain_is_used_up_before_it_begins_again_across_epochs_and_shares():
    drawn = order()
    seen: dict[int, list[int]] = {0: [], 1: []}
    for epoch, gaps in enumerate(([1.0, 1.0], [1.0, 3.0], [2.0, 1.0], [1.0, 1.5])):
        for place in drawn.rows(epoch).tolist():
            seen[int(place >= 40)].append(place)
        drawn.advance(np.array(gaps))
    for number, places in seen.items():
        pool = drawn.pools[number]
        passes = [places[at : at + len(pool)] for at in range(0, len(places), len(pool))]
        assert all(sorted(one) == sorted(pool) for one in passes[:-1])
        assert len(places) == drawn.taken[number]
    assert len(seen[1]) > 3 * len(drawn.pools[1]), "the small domain began again"


def test_an_order_goes_on_from_its_state_with_the_rows_that_it_would_have_had():
    drawn = order()
    for gaps in ([1.0, 2.0], [1.5, 1.0]):
        drawn.advance(np.array(gaps))
    drawn.teacher = np.array([1.0, 2.0])
    again = order()
    again.load_state_dict(drawn.state_dict())
    assert np.array_equal(again.rows(2), drawn.rows(2)) and np.array_equal(again.teacher, drawn.teacher)
    with pytest.raises(ValueError, match="with the shares of epoch 0"):
        order().rows(1)


def test_pieces_of_a_document_are_either_measured_or_trained_on():
    rows = [{"domain": n // 30, "index": n} for n in range(60)]
    documents = np.arange(60) // 4 + 100
    drawn = DomainGaps(held_out=5).order(rows, 0, 4, documents)
    for number in (0, 1):
        measured, trained = drawn.slices[number], drawn.pools[number]
        assert len(measured) == 5 and not set(documents[measured]) & set(documents[trained])
        assert len(trained) >= 30 - 9


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((10,), "all rows are of one domain"), ((40, 3), "sampler.held_out: 3 of a domain of 3 sequences")],
)
def test_rows_that_cannot_be_weighed_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        order(sizes)


@pytest.mark.parametrize("long", [30, 29])
def test_a_domain_of_one_or_two_documents_is_refused_by_the_key_or_split_between_them(long):
    rows = [{"domain": n // 30, "index": n} for n in range(60)]
    documents = np.array([0] * long + [1] * (30 - long) + [*range(2, 32)])
    with pytest.raises(ValueError, match=rf"sampler.held_out: 30 .* of {1 + (long < 30)} documents"):
        DomainGaps(held_out=30).order(rows, 0, 4, documents)
    if long == 29:
        drawn = DomainGaps(held_out=1).order(rows, 0, 4, documents)
        assert len(drawn.slices[0]) == 1 and len(drawn.pools[0]) in (1, 29)


def test_packed_rows_are_refused_since_they_mix_domains():
    with pytest.raises(ValueError, match="several values in a row"):
        DomainGaps().order([{"domain": [1, 2]}, {"domain": [2, 1]}], 0, 4)
