"""results: what a job found, as results.json has it."""

import json
from typing import Any

from kdlm.disk import write_text
from kdlm.estimates import SIGNIFICANT, finite
from kdlm.jobs.cache import file_name
from kdlm.jobs.card import card, model_index
from kdlm.jobs.job import Job
from kdlm.jobs.running import Answers
from kdlm.jobs.significance import Documents, comparable, difference, documents, gap_closed


def results(job: Job, given: dict[str, Answers]) -> dict[str, Any]:
    """Return the job's results; figures are {value, error}, error null where nothing tells it."""
    models = {
        name: {"role": section.role, "path": getattr(section, "path", None) or section.url, "hash": given[name].hash}
        | given[name].about
        for name, section in job.models.items()
    }
    tasks: dict[str, Any] = {}
    for asked in job.tasks:
        by_model = {name: answers.results[asked] for name, answers in given.items()}
        first = next(iter(by_model.values()))
        for task, figures in first["tasks"].items():
            if not _told_by(job, asked, task):
                continue
            metrics = dict.fromkeys(metric for result in by_model.values() for metric in _metrics_of(result, task))
            tasks[task] = {
                "version": figures["version"],
                "samples": figures["samples"],
                "asked": task == asked or task not in first["groups"].get(asked, []),
                "metrics": {metric: _metric(job, by_model, task, metric) for metric in metrics},
            }
    return {"job": job.model_dump(mode="json"), "models": models, "tasks": tasks}


def _told_by(job: Job, asked: str, task: str) -> bool:
    """Whether what was asked tells of a task: one that has its own line in the job is told of by that, no group."""
    return task == asked or task not in job.tasks


def _metric(job: Job, by_model: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    having = {name: result for name, result in by_model.items() if metric in _metrics_of(result, task)}
    figures = {name: _metrics_of(result, task)[metric] for name, result in having.items()}
    known = documents(having, task, metric)
    told = {
        name: {key: None if figure[key] is None else finite(figure[key]) for key in ("value", "error")}
        if (behind := known[name]) is None
        else behind.estimate().as_json()
        for name, figure in figures.items()
    }
    higher = next(iter(figures.values()))["higher_is_better"]
    baselines, teachers, students = (
        [name for name in job.of(role) if name in figures] for role in ("baseline", "teacher", "student")
    )
    pairs = [
        {"model": ours, "other": theirs, **_difference(known[ours], known[theirs])}
        for ours in students
        for theirs in baselines + teachers
        if comparable(known[ours], known[theirs])
    ]
    first = next(iter(job.of("baseline")), None)
    return {
        "higher_is_better": higher,
        "errors_from": "documents" if all(known.values()) else "lm-eval",
        "models": told,
        "against_baseline": {pair["model"]: _less(pair) for pair in pairs if pair["other"] == first},
        "pairs": pairs,
        "gap_closed": _gaps(known, students, first, teachers[0] if teachers else None, higher),
    }


def _metrics_of(result: dict[str, Any], task: str) -> dict[str, Any]:
    return result["tasks"].get(task, {}).get("metrics", {})


def _less(pair: dict[str, Any]) -> dict[str, Any]:
    return {key: pair[key] for key in ("difference", "error", "p_value")}


def _difference(ours: Documents | None, theirs: Documents | None) -> dict[str, Any]:
    assert ours is not None and theirs is not None
    found = difference(ours, theirs)
    return {
        "difference": finite(found.value),
        "error": finite(found.error),
        "p_value": finite(found.p_value),
    }


def _gaps(
    known: dict[str, Any], students: list[str], baseline: str | None, teacher: str | None, higher: bool | None
) -> dict[str, Any]:
    """Return what each student closes of the gap; none where the teacher is not significantly better than the baseline.

    `higher` says which is better; where nobody knows, both are gaps.
    """
    if baseline not in known or teacher is None or not comparable(known[baseline], known[teacher]):
        return {}
    gap = difference(known[teacher], known[baseline])
    if not gap.p_value < SIGNIFICANT or (higher is not None and (gap.value > 0) != higher):
        return {}
    return {
        name: gap_closed(known[name], known[baseline], known[teacher]).as_json()
        for name in students
        if comparable(known[name], known[baseline])
    }


def write(job: Job, found: dict[str, Any], given: dict[str, Answers]) -> None:
    """Write samples/MODEL/TASK.jsonl, model-index/MODEL.yaml, results.md and results.json into the output folder."""
    for name, answers in given.items():
        found_in = [(asked, *each) for asked, one in answers.results.items() for each in one["samples"].items()]
        for asked, task, samples in found_in:
            if _told_by(job, asked, task):
                lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
                write_text(job.output / "samples" / file_name(name) / f"{file_name(task)}.jsonl", lines)
        if found["tasks"]:
            write_text(job.output / "model-index" / f"{file_name(name)}.yaml", model_index(found, name))
    write_text(job.output / "results.md", card(found))
    write_text(job.output / "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
