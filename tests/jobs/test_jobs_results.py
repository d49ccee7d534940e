"""What a job tells of results that are given: which, of whom, and beside whom."""

import json
import math
from typing import Any

import pytest

from kdlm.jobs import Job
from kdlm.jobs.card import card
from kdlm.jobs.results import results, write
from kdlm.jobs.running import Answers

ROLES = {"teacher": "teacher", "student": "student", "plain": "baseline"}
RIGHT = {"teacher": [1, 1, 1, 1, 1, 1, 1, 0], "student": [1, 1, 1, 0, 1, 1, 0, 0], "plain": [0, 0, 1, 0, 0, 0, 0, 0]}


def told(values: dict[str, list[Any]], higher: bool = True, **more: float) -> dict[str, Any]:
    """Return what a model gave on one task, `t`: means of documents by metric; `more` are figures without documents."""
    about = {"filter": "none", "higher_is_better": higher, "error": None}
    figures = {
        name: {**about, "metric": name, "value": sum(numbers) / len(numbers)} for name, numbers in values.items()
    }
    figures |= {name: {**about, "metric": name, "value": value} for name, value in more.items()}
    samples = [
        {"doc_id": place, "target_hash": f"answer {place}", "filter": "none", **dict(zip(values, row, strict=True))}
        for place, row in enumerate(zip(*values.values(), strict=True))
    ]
    return {
        "tasks": {"t": {"version": 1, "samples": len(samples), "metrics": figures}},
        "samples": {"t": samples},
        "groups": {},
    }


def job(*tasks: str) -> Job:
    models = {name: {"name": "hf", "path": "sandbox:code-teacher", "role": role} for name, role in ROLES.items()}
    return Job.model_validate({"models": models, "tasks": dict.fromkeys(tasks or ("t",))})


def found(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what is told of the task `t`, after it went through JSON that knows no nan, and a table."""
    said = results(job(), {name: Answers(name, {}, {"t": result}) for name, result in given.items()})
    card(said)
    return json.loads(json.dumps(said["tasks"]["t"]["metrics"], allow_nan=False))


@pytest.mark.parametrize("higher", [True, False])
def test_the_gap_is_that_to_a_better_teacher_whichever_way_is_better(higher):
    better = {name: [row if higher else 1 - row for row in rows] for name, rows in RIGHT.items()}
    acc = found({name: told({"acc": rows}, higher) for name, rows in better.items()})["acc"]
    assert acc["gap_closed"]["student"]["value"] == pytest.approx((5 - 1) / (7 - 1))
    worse = {"teacher": better["plain"], "student": better["student"], "plain": better["teacher"]}
    acc = found({name: told({"acc": rows}, higher) for name, rows in worse.items()})["acc"]
    assert acc["gap_closed"] == {} and acc["against_baseline"]["student"]["p_value"] is not None


def test_a_metric_that_the_first_model_lacks_is_told_of_the_others():
    given = {name: told({"acc": rows, "perplexity": rows}) for name, rows in RIGHT.items()}
    del given["teacher"]["tasks"]["t"]["metrics"]["perplexity"]
    metrics = found(given)
    assert set(metrics["perplexity"]["models"]) == {"student", "plain"} and set(metrics["acc"]["models"]) == set(ROLES)
    assert metrics["perplexity"]["against_baseline"] == metrics["acc"]["against_baseline"]


def test_a_metric_that_the_baseline_lacks_is_not_compared_with_it():
    given = {name: told({"acc": rows}) for name, rows in RIGHT.items()}
    given["plain"]["tasks"]["t"]["metrics"] = {}
    acc = found(given)["acc"]
    assert acc["against_baseline"] == {} == acc["gap_closed"] and len(acc["pairs"]) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_no_numbers_are_null(value):
    given = {name: told({"acc": rows}, bleu=value) for name, rows in RIGHT.items()}
    assert found(given)["bleu"]["models"]["teacher"] == {"value": None, "error": None}
    rows = {name: told({"acc": [value, *rows[1:]]}) for name, rows in RIGHT.items()}
    acc = found(rows)["acc"]
    assert acc["models"]["teacher"]["value"] is None and acc["gap_closed"] == {}


def test_models_that_are_alike_in_all_documents_are_not_told_apart():
    pair = found({name: told({"acc": RIGHT["student"]}) for name in ROLES})["acc"]["against_baseline"]["student"]
    assert pair == {"difference": 0, "error": 0, "p_value": 1}


def test_one_document_tells_no_error_and_no_difference():
    acc = found({name: told({"acc": rows[:1]}) for name, rows in RIGHT.items()})["acc"]
    assert acc["models"]["teacher"] == {"value": 1, "error": None}
    assert acc["against_baseline"]["student"] == {"difference": 1, "error": None, "p_value": None}


def test_documents_that_changed_behind_their_numbers_are_not_compared():
    given = {name: told({"acc": rows}) for name, rows in RIGHT.items()}
    given["student"]["samples"]["t"][3]["target_hash"] = "of a newer version of the data"
    assert found(given)["acc"]["pairs"] == []


def test_a_task_that_has_a_line_of_its_own_is_told_by_that_and_not_by_its_group(tmp_path):
    alone = told({"acc": [1, 1]})
    group = {**told({"acc": [0, 0, 0, 0]}), "groups": {"g": ["t"]}}
    group["tasks"] = {"g": group["tasks"]["t"], **group["tasks"]}
    for order in (["t", "g"], ["g", "t"]):
        one = job(*order).model_copy(update={"output": tmp_path})
        given = {"teacher": Answers("", {}, {task: {"t": alone, "g": group}[task] for task in order})}
        one = one.model_copy(update={"models": {"teacher": one.models["teacher"]}})
        tasks = (said := results(one, given))["tasks"]
        assert tasks["t"]["asked"] and tasks["t"]["samples"] == 2 and tasks["g"]["samples"] == 4
        write(one, said, given)
        assert len((tmp_path / "samples/teacher/t.jsonl").read_text().splitlines()) == 2
