"""Schedules: where a weight stands at a moment of training."""

import pytest
from pydantic import TypeAdapter, ValidationError

from kdlm.losses import Constant, Cosine, Linear, Step, Weight
from kdlm.losses.schedule import value_at

ADAPTER = TypeAdapter(Weight)


def test_a_number_and_a_constant_stay():
    assert [value_at(weight, p, 7) for weight in (0.3, Constant(level=0.3)) for p in (0, 1)] == [0.3] * 4


@pytest.mark.parametrize("ramp", [Linear, Cosine])
def test_a_ramp_is_still_outside_its_span_and_monotone_inside(ramp):
    schedule = ramp(start=1.0, end=0.2, begin=0.25, until=0.75)
    assert schedule.value(0.0, 0) == schedule.value(0.25, 0) == 1.0
    assert schedule.value(0.75, 0) == pytest.approx(0.2) == schedule.value(1.0, 0)
    assert schedule.value(0.5, 0) == pytest.approx(0.6)
    inside = [schedule.value(0.25 + i / 40, 0) for i in range(21)]
    assert inside == sorted(inside, reverse=True)


def test_a_cosine_is_flat_at_its_ends_where_a_line_is_not():
    cosine, line = Cosine(start=0.0, end=1.0), Linear(start=0.0, end=1.0)
    assert cosine.value(0.01, 0) < 0.1 * line.value(0.01, 0)


def test_a_step_jumps_at_its_moment_from_one_loss_to_another():
    forward, reverse = Step(values=[1, 0], at=[0.5]), Step(values=[0, 1], at=[0.5])
    assert [forward.value(p, 0) for p in (0, 0.49, 0.5, 1)] == [1, 1, 0, 0]
    assert all(forward.value(p / 10, 0) + reverse.value(p / 10, 0) == 1 for p in range(11))


def test_a_step_can_count_optimiser_steps():
    schedule = Step(values=[1, 0.5, 0], at=[10, 20], unit="step")
    assert [schedule.value(0.0, step) for step in (9, 10, 19, 20)] == [1, 0.5, 0.5, 0]


def test_a_recipe_names_a_schedule_or_gives_a_number():
    assert ADAPTER.validate_python(0.5) == 0.5
    assert ADAPTER.validate_python({"name": "linear", "start": 0, "end": 1}) == Linear(start=0, end=1)


@pytest.mark.parametrize(
    "wrong",
    [
        -1.0,
        {"name": "linear", "start": 0, "end": 1, "begin": 0.5, "until": 0.5},
        {"name": "step", "values": [1, 0], "at": [0.5, 0.6]},
        {"name": "step", "values": [1, 0, 1], "at": [0.6, 0.5]},
        {"name": "step", "values": [1, 0], "at": [100]},
        {"name": "stairs", "values": [1, 0], "at": [100]},
    ],
)
def test_a_wrong_schedule_is_refused(wrong):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)
