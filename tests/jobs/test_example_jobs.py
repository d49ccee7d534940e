"""The jobs of `eval/jobs` can be read, ask for tasks that there are, and point editors at their schema."""

from pathlib import Path

import pytest

from kdlm.jobs import Job
from kdlm.jobs.harness import Tasks
from kdlm.section_loader import load_section

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "eval" / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_points_editors_at_the_schema(path):
    pointer = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / pointer).resolve() == ROOT / "eval" / "schema.json"


def test_every_job_asks_for_tasks_that_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = [load_section(Job, path) for path in JOBS]
    assert len(jobs) >= 4
    tasks = {name: settings for job in jobs for name, settings in job.tasks.items()}
    Tasks(jobs[0].model_copy(update={"tasks": tasks})).check()  # all at once: the harness's index takes seconds
