"""Metrics have one name, unit and direction; a gap is closed only where there is one."""

import math

import pytest

from kdlm.losses import all_measures_for
from kdlm.markdown import table
from kdlm.metrics import METRICS, TEACHERS, gap_closed, metric
from kdlm.signal import Dense


def test_every_measure_of_a_student_beside_its_teacher_has_a_name():
    inner = {"confidence", "teacher_confidence"}
    for name in set(all_measures_for(Dense)) - inner:
        assert name in METRICS or name in TEACHERS.values(), name


def test_a_logged_name_is_that_of_its_metric():
    assert metric("eval_kl_to_teacher") is METRICS["kl_to_teacher"]
    assert metric("top1_agreement").label == "top-1 agreement, %"
    assert metric("something_of_mine").label == "something of mine"


def test_of_the_teachers_own_figures_none_is_the_students_aim():
    assert metric("teacher_ece").unit == "%" and metric("teacher_ece").better == 0


@pytest.mark.parametrize(("student", "share"), [(4.0, 0.0), (3.0, 0.5), (2.0, 1.0), (5.0, -0.5), (1.0, 1.5)])
def test_the_gap_closed_is_a_share_of_the_way(student, share):
    assert gap_closed(4.0, student, 2.0) == share


@pytest.mark.parametrize("teacher", [4.0, 4.0 - 1e-9, 5.0, math.inf, math.nan])
def test_there_is_no_gap_to_a_teacher_that_is_no_better(teacher):
    assert math.isnan(gap_closed(4.0, 4.5, teacher))


def test_a_cell_cannot_break_its_table():
    text = table(["name", "a|b"], [["x\ny", "1"], ["|", "2"]], words=1)
    assert text == "| name | a\\|b |\n|---|---:|\n| x y | 1 |\n| \\| | 2 |"
