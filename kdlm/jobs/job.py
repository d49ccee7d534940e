"""What an evaluation job says."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdlm.disk import cache_folder
from kdlm.jobs.distillation import Distillation
from kdlm.jobs.models import AnyEvaluated, InProcess
from kdlm.jobs.speed import Speed
from kdlm.section import Section

Limit = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None
BatchSize = Annotated[int, Field(ge=1)] | Literal["auto"]


class TaskSettings(Section):
    """What one task does otherwise than its own file, or the job, says."""

    limit: Limit = None
    """Documents to take, the first ones, or a share of them below 1; by default the job's `limit`."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each question; by default what the task's file says."""
    generation: dict[str, Any] = {}
    """Replaces values of the task's `generation_kwargs`: {max_gen_toks: 128, do_sample: true, temperature: 0.7}."""


class Job(Section):
    """An evaluation: some models, each on every task."""

    models: dict[str, AnyEvaluated] = Field(min_length=1)
    """What is evaluated, by the name that the table gives it. The order is that of the columns."""
    tasks: dict[str, TaskSettings | None] = {}
    """Tasks, groups and tags of lm-evaluation-harness by name, each with settings of its own or nothing:
    {hellaswag: {limit: 100}, kdlm_code_next: }."""
    include_path: list[Path] | None = None
    """Folders with task files besides those of lm-evaluation-harness, whose names they may take over; by default
    `eval/tasks`, where there is such a folder."""
    limit: Limit = None
    """Documents of each task, the first ones, or a share of them below 1; by default all."""
    batch_size: BatchSize = 8
    """Requests read together; `auto` looks for the most that fit into a GPU."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of examples that are drawn, and of sampled answers."""
    apply_chat_template: bool = False
    """Ask as the models' chat templates say. For chat models, and the only way to ask a server's chat endpoint."""
    bootstrap: int = Field(1000, ge=0)
    """Draws for lm-evaluation-harness's own standard errors, which are taken where values of single documents do not
    tell: BLEU and the like."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute what a model wrote: `unsafe_code` in their files. kdlm's own do so in a jail, others, such
    as humaneval, with nothing around it."""
    distillation: Distillation | None = None
    """Also measure what students and baselines keep of the teacher, token by token."""
    speed: Speed | None = None
    """Also measure how fast the models of this machine are, and how much memory they take."""
    output: Path = Path("eval/results")
    """Folder for `results.json`, `results.md`, the answers in `samples/` and the harness's own messages."""
    cache: Path | None = Field(default_factory=lambda: cache_folder("eval"))
    """Folder that keeps what was evaluated; by default `eval` in kdlm's cache ($KDLM_CACHE). `null` keeps nothing."""

    @model_validator(mode="after")
    def _something_to_do(self) -> "Job":
        if not (self.tasks or self.distillation or self.speed):
            raise ValueError("nothing to do: give tasks, distillation, or speed")
        return self

    def of(self, role: str) -> list[str]:
        """Return the names of the models in a role."""
        return [name for name, model in self.models.items() if model.role == role]

    def here(self) -> dict[str, InProcess]:
        """Return the models of this process."""
        return {name: model for name, model in self.models.items() if isinstance(model, InProcess)}

    def settings(self, task: str) -> TaskSettings:
        """Return a task's settings, with the job's limit where it has none of its own."""
        settings = self.tasks[task] or TaskSettings()
        return settings if settings.limit is not None else settings.model_copy(update={"limit": self.limit})

    def folders(self) -> list[Path]:
        """Return the folders with task files. Raises ValueError for one that is not there."""
        if self.include_path is None:
            return [folder for folder in (Path("eval/tasks"),) if folder.is_dir()]
        for index, folder in enumerate(self.include_path):
            if not folder.expanduser().is_dir():
                raise ValueError(f"include_path.{index}: {folder}: no such folder")
        return [folder.expanduser() for folder in self.include_path]
