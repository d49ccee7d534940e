"""Draws: numbers that belong to a sample, and are as good as a generator's."""

import itertools

import pytest
import torch

from kdlm.diffusion import Draws

INDEX = torch.arange(4000)


def test_a_samples_numbers_do_not_depend_on_its_place_or_its_company():
    whole, shuffled = Draws(INDEX[:64], 1, 2), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for draw in (lambda d: d.normal("a", (2, 3)), lambda d: d.uniform("a"), lambda d: d.integer("a", 7)):
        assert torch.equal(draw(Draws(INDEX[:64][shuffled], 1, 2)), draw(whole)[shuffled])
        parts = [draw(Draws(part, 1, 2)) for part in INDEX[:64].split([10, 1, 53])]
        assert torch.equal(torch.cat(parts), draw(whole))


def test_a_shorter_shape_is_the_start_of_a_longer_one():
    assert torch.equal(Draws(INDEX, 1, 2).normal("a", (5,))[:, :3], Draws(INDEX, 1, 2).normal("a", (3,)))


def test_normal_numbers_have_the_moments_and_the_tails_of_a_normal_law():
    values = Draws(INDEX, 0, 0).normal("noise", (50,)).double().flatten()
    count = len(values)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = values.pow(power).std() / count**0.5
        assert (values.pow(power).mean() - moment).abs() < 4.5 * spread, power
    assert 4 < values.abs().max() < 6.5 and len(values.unique()) > 0.98 * count  # float32 has its grid


def test_uniform_numbers_fill_the_open_interval_evenly():
    values = Draws(INDEX, 0, 0).uniform("time", (50,)).flatten()
    assert 0 < values.min() and values.max() < 1
    shares = torch.histc(values, 20, 0, 1) / len(values)
    assert (shares - 0.05).abs().max() < 5 * (0.05 * 0.95 / len(values)) ** 0.5
    whole = Draws(INDEX, 0, 0).integer("step", 4)
    assert whole.unique().tolist() == [0, 1, 2, 3] and whole.bincount().min() > 850


STREAMS = {
    "plain": Draws(INDEX, 0, 0).normal("a", (4,)),
    "of another name": Draws(INDEX, 0, 0).normal("b", (4,)),
    "of the next step": Draws(INDEX, 0, 1).normal("a", (4,)),
    "of another seed": Draws(INDEX, 1, 0).normal("a", (4,)),
    "of the next samples": Draws(INDEX + 1, 0, 0).normal("a", (4,)),
    "of the places after": Draws(INDEX, 0, 0).normal("a", (8,))[:, 4:],
}


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(STREAMS, 2)])
def test_streams_are_not_correlated(one, other):
    a, b = STREAMS[one].flatten().double(), STREAMS[other].flatten().double()
    bound = 4.5 / len(a) ** 0.5
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < bound
    assert abs(torch.corrcoef(torch.stack([a.square(), b.square()]))[0, 1]) < bound


def test_places_of_one_sample_and_neighbouring_samples_are_not_correlated():
    values = Draws(INDEX, 0, 0).normal("a", (6,)).double()
    correlation = torch.corrcoef(values.T) - torch.eye(6)
    assert correlation.abs().max() < 4.5 / len(INDEX) ** 0.5
    assert abs(torch.corrcoef(torch.stack([values[1:, 0], values[:-1, 0]]))[0, 1]) < 4.5 / len(INDEX) ** 0.5


def test_what_all_samples_share_is_one_number_of_the_step():
    shared = [Draws(INDEX, 0, step).shared("step") for step in range(2000)]
    assert Draws(INDEX + 7, 0, 3).shared("step") == shared[3] and len(set(shared)) == 2000
    assert all(0 <= value < 1 for value in shared)
    assert sum(shared) / 2000 == pytest.approx(0.5, abs=0.03)
