"""What a guard's section says, and what looks come to: rules without a model."""

import math

import pytest
from pydantic import ValidationError

from kdlm.guards import GuardsSection, Limit, Watched
from kdlm.guards.course import Course, refuse_stopped


@pytest.mark.parametrize(
    ("limit", "within", "beyond"),
    [
        (Limit(below=0.5), 0.5, 0.49),
        (Limit(above=2), 2.0, 2.01),
        (Limit(below_start=0.2), 0.8, 0.79),
        (Limit(above_start=3), 12.0, 12.1),
    ],
)
def test_a_limit_is_crossed_beyond_it_and_by_what_is_not_finite(limit: Limit, within: float, beyond: float) -> None:
    assert not limit.crossed(within, 4.0)
    assert limit.crossed(beyond, 4.0)
    assert limit.crossed(math.nan, 4.0) == limit.crossed(math.inf, 4.0) == "not finite"


def test_only_looks_in_a_row_count_and_a_warning_comes_once() -> None:
    section = GuardsSection(entropy=Watched(warn=Limit(below=2), stop=Limit(below=1), patience=2))
    course, values = Course(section), [3, 1.5, 2.5, 1.5, 1.5, 0.5, 1.5, 0.5, 0.5]
    found = [[one.level for one in course.take(step, {"entropy": value})] for step, value in enumerate(values)]
    assert found == [[], [], [], [], ["warn"], [], [], [], ["stop"]]


def test_a_look_without_the_figure_is_no_look() -> None:
    course = Course(GuardsSection(length=Watched(stop=Limit(below=2), patience=2)))
    assert not course.take(1, {"length": 1.0}) and not course.take(2, {})
    assert course.take(3, {"length": 1.0})[0].looks == 2


def test_what_is_said_names_figure_limit_and_what_to_try() -> None:
    course = Course(GuardsSection(entropy=Watched(stop=Limit(below_start=0.2), patience=2)))
    course.take(1, {"entropy": 2.5})
    course.take(10, {"entropy": 0.1})
    (stop,) = course.take(20, {"entropy": 0.05})
    assert str(stop) == ("guards.entropy.stop: 0.05 at step 20 is below 0.2 times its start, 2.5 for 2 looks in a row")
    assert "learning rate" in stop.advice


def test_a_resumed_run_is_judged_by_the_looks_of_its_log() -> None:
    history = [{"step": 1, "guard/entropy": 2.0}, {"step": 5, "loss": 1.0}, {"step": 10, "guard/entropy": 0.1}]
    strict, wider = (GuardsSection(entropy=Watched(stop=Limit(below=b), patience=1)) for b in (0.5, 0.05))
    with pytest.raises(ValueError, match=r"guards\.entropy\.stop: 0\.1 at step 10 .*guards\.entropy\.stop=null"):
        refuse_stopped(strict, history, "runs/x")
    assert refuse_stopped(wider, history, "runs/x").start == {"entropy": 2.0}
    assert not refuse_stopped(strict, history[:2], "runs/x").beyond["entropy", "stop"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Limit(), "no limit"),
        (lambda: Limit(below=None), "no limit"),
        (lambda: Limit(above=float("nan")), "finite"),
        (lambda: Watched(), "nothing to do"),
        (lambda: GuardsSection(), "nothing is watched"),
        (lambda: GuardsSection(kl_to_start=Watched(stop=Limit(above_start=3))), "begins at 0"),
    ],
)
def test_a_section_that_does_nothing_is_refused(made, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        made()
