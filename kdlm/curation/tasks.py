"""The step `tasks`: every row becomes one row for each task, such as label and rationale."""

from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.rows import dataset_of
from kdlm.curation.step import Desk, Step, need
from kdlm.curation.templates import columns_of, filled
from kdlm.section import Section


class Task(Section):
    """What is asked of a row, and what is answered."""

    prompt: str
    """The prompt, with columns of the row in braces: "[label] {prompt}"."""
    completion: str
    """The completion, likewise: "{answer}"."""


class Tasks(Step):
    """Makes one row for each task of every row (Distilling step-by-step, arXiv 2305.02301): adds `task`.

    Writes `prompt` and `completion`; the other columns stay. Train on it with `columns: {domain: task}` and the method
    `step_by_step`.
    """

    name: Literal["tasks"] = "tasks"
    tasks: dict[str, Task] = Field(min_length=1)
    """{label: {prompt: "[label] {prompt}", completion: "{answer}"}, rationale: ...}"""

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        read = {name for task in self.tasks.values() for name in columns_of(task.prompt) + columns_of(task.completion)}
        need(rows, *sorted(read), by="tasks")
        made: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            values: dict[str, Any] = dict(row)
            for name, task in self.tasks.items():
                prompt, completion = filled(task.prompt, values), filled(task.completion, values)
                if prompt is None or not completion:
                    desk.counts.note(f"nothing to say for task {name}", f"row {number}")
                    continue
                made.append(values | {"prompt": prompt, "completion": completion, "task": name})
        return dataset_of(made)
