"""The step `tasks`: every row becomes one row for each task, such as label and rationale."""

from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.prompts import last_said, prompt_of
from kdlm.curation.rows import dataset_of
from kdlm.curation.step import Desk, Step
from kdlm.curation.templates import check_template, filled
from kdlm.data.report import Unusable
from kdlm.section import Section


class Task(Section):
    """What is asked of a row, and what is answered."""

    prompt: str
    """The prompt, with columns of the row in braces: "[label] {prompt}"."""
    completion: str
    """The completion, likewise: "{answer}"."""

    def of(self, row: dict[str, Any]) -> dict[str, str]:
        """Return prompt and completion of a row. Raises Unusable where it lacks what they are made of."""
        if not (completion := filled(self.completion, last_said(row))):
            raise Unusable("no completion")
        return {"prompt": prompt_of(row, self.prompt), "completion": completion}


class Tasks(Step):
    """Makes one row for each task of every row (Distilling step-by-step, arXiv 2305.02301): adds `task`.

    Writes `prompt` and `completion`; the other columns stay. A prompt that is a conversation stays one, and `{prompt}`
    is its last message. Train on it with `columns: {domain: task}` and the method `step_by_step`.
    """

    name: Literal["tasks"] = "tasks"
    tasks: dict[str, Task] = Field(min_length=1)
    """{label: {prompt: "[label] {prompt}", completion: "{answer}"}, rationale: ...}"""

    def leaves(self, before: list[str]) -> list[str]:
        for name, task in self.tasks.items():
            for key in ("prompt", "completion"):
                check_template(getattr(task, key), before, f"tasks.{name}.{key}")
        return list(dict.fromkeys([*before, "prompt", "completion", "task"]))

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        made: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            values: dict[str, Any] = dict(row)
            for name, task in self.tasks.items():
                try:
                    made.append(values | {**task.of(values), "task": name})
                except Unusable as why:
                    desk.counts.note(f"nothing to say for task {name}", f"row {number}: {why}")
        if not made:
            raise ValueError("\n".join(["tasks: no row has what a task needs", *desk.counts.lines()]))
        return dataset_of(made)
