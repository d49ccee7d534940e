"""TAID's schedule: once per optimiser step, from the mean loss, never from evaluation."""

import itertools

import pytest
import torch

from kdlm.methods import Step, Taid


def run_schedule(losses: list[float], **options) -> list[float]:
    method, total = Taid(**options), len(losses)
    path = []
    for index, loss in enumerate(losses, start=1):
        method.stepped(Step(index, total), {"taid": torch.tensor(loss)} if method.follows else {})
        path.append(method.t.item())
    return path


def test_it_never_falls_and_ends_at_the_end() -> None:
    path = run_schedule([5.0, 4.0, 6.0, 3.0, 3.0, 8.0, 2.0, 1.0, 1.0, 0.5], start=0.2, end=0.9)
    assert all(later >= earlier for earlier, later in itertools.pairwise(path))
    assert path[-1] == pytest.approx(0.9)


def test_growth_beyond_the_ramp_is_at_most_alpha_times_what_is_left() -> None:
    alpha, previous = 0.05, 0.2
    losses = [2.0 ** (-i) for i in range(200)]
    for index, t in enumerate(run_schedule(losses, start=0.2, alpha=alpha), start=1):
        ramp = 0.2 + 0.8 * index / 200
        assert t <= max(ramp, previous + alpha * (1 - previous)) + 1e-6
        previous = t


def test_a_falling_loss_moves_faster_than_the_ramp_and_a_rising_one_slower() -> None:
    options = {"start": 0.2, "alpha": 0.3, "beta": 0.5}
    falling = run_schedule([4.0 * 0.8**i for i in range(20)], **options)
    rising = run_schedule([4.0 * 1.5**i for i in range(20)], **options)
    ramp = run_schedule([1.0] * 20, start=0.2, adaptive=False)
    assert falling[5] > rising[5] and falling[5] > ramp[5]


def test_without_adaptation_it_is_the_linear_ramp() -> None:
    assert run_schedule([1.0] * 4, start=0.2, end=1.0, adaptive=False) == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_its_state_survives_a_checkpoint() -> None:
    method = Taid(start=0.3, alpha=0.01)
    for index, loss in enumerate([3.0, 2.0, 1.5], start=1):
        method.stepped(Step(index, 100), {"taid": torch.tensor(loss)})
    copy = Taid(start=0.3, alpha=0.01)
    copy.load_state_dict(method.state_dict())
    for schedule in (method, copy):
        schedule.stepped(Step(4, 100), {"taid": torch.tensor(1.2)})
    assert torch.equal(method.t, copy.t) and torch.equal(method.momentum, copy.momentum)


def test_the_update_is_the_published_one() -> None:
    """Two steps by hand: the first stores the loss, the second moves t by sigmoid(momentum) * alpha * (1 - t)."""
    method = Taid(start=0.4, alpha=0.1, beta=0.9)
    method.stepped(Step(1, 1000), {"taid": torch.tensor(2.0)})
    t = method.t.item()
    assert t == pytest.approx(0.4 + 0.6 / 1000)
    method.stepped(Step(2, 1000), {"taid": torch.tensor(1.0)})
    momentum = 0.1 * (2.0 - 1.0) / 2.0
    expected = t + 1 / (1 + 2.718281828459045**-momentum) * 0.1 * (1 - t)
    assert method.t.item() == pytest.approx(expected, rel=1e-5)
