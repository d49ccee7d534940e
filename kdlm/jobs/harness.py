"""harness: what kdlm asks of lm-evaluation-harness, and keeps it from doing.

Its import takes seconds, so it happens inside of functions.
"""

import json
import platform
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdlm import __version__
from kdlm.jobs.digests import digest, digest_of_files
from kdlm.jobs.job import Job
from kdlm.section_loader import suggestion

Sample = dict[str, Any]


def require() -> None:
    """Raise ValueError where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"kdlm eval needs lm-evaluation-harness ({error}): pip install 'kdlm[eval]'") from error


class Tasks:
    """The tasks of a job, as the harness's files describe them.

    Args:
        job: says which, and where their files are.
        told: what tasks that make their own documents may ask about the model: `pretrained` and `tokenizer`.
    """

    def __init__(self, job: Job, told: Mapping[str, str] | None = None):
        self.job, self.told = job, dict(told or {})

    @cached_property
    def manager(self) -> Any:
        """The harness's index; its own 14,000 tasks are only read where a name is not in the job's folders."""
        from lm_eval.tasks import TaskManager

        folders: list[str | Path] = [*self.job.folders()]
        told: dict[str, Any] = self.told
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=told)
        if all(name in manager.task_index for name in self.job.tasks):
            return manager
        return TaskManager(include_path=folders, metadata=told)

    def check(self) -> None:
        """Raise ValueError for names that there are not, and for tasks that need a consent which is not given."""
        problems = []
        for name in self.job.tasks:
            if name not in self.manager.task_index:
                close = suggestion(name, self.manager.all_tasks)
                where = ", ".join(map(str, self.job.folders())) or "no folder of your own"
                problems.append(f"tasks.{name}: no such task{close or '.'} Looked in lm-evaluation-harness and {where}")
                continue
            configs = list(self.configs(name))
            if not self.job.confirm_run_unsafe_code and any(config.get("unsafe_code") for config in configs):
                problems.append(
                    f"tasks.{name}: it runs what a model wrote. kdlm's own tasks do so in a jail; for others, take a "
                    "machine that may break. Then set confirm_run_unsafe_code: true"
                )
            shots = self.job.settings(name).num_fewshot
            if shots and any(config.get("num_fewshot") == 0 for config in configs):
                problems.append(f"tasks.{name}.num_fewshot: {shots}, and the task's file fixes 0")
        if problems:
            raise ValueError("\n".join(problems))

    def configs(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield what the files of a task say, functions by name; of a group or tag, those of all its members."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.manager.task_index[name]
        for member in sorted(entry.tags) if entry.yaml_path is None else []:
            yield from self.configs(member)
        if entry.yaml_path is None:
            return
        config = load_yaml(entry.yaml_path, resolve_func=False)
        beside = _files_beside(entry.yaml_path, config)
        yield {**config, "files": digest_of_files(beside)} if beside else config
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            member = member.get("task", member.get("group")) if isinstance(member, dict) else member
            if isinstance(member, str) and member in self.manager.task_index:
                yield from self.configs(member)

    def identity(self, name: str) -> dict[str, Any]:
        """Return what the figures of a task depend on beside the model, as plain data."""
        job = self.job
        return {
            "task": name,
            "files": digest(list(self.configs(name))),
            "settings": job.settings(name).model_dump(),
            "seed": job.seed,
            "chat": job.apply_chat_template,
            "bootstrap": job.bootstrap,
            "versions": [version("lm_eval"), __version__, platform.python_version()],
        }

    def evaluate(self, lm: Any, name: str) -> dict[str, Any]:
        """Return what the harness says of a model on a task, as plain data.

        `tasks` maps each task and group to {version, samples, metrics: {metric: {higher_is_better, value, error}}},
        `samples` each task to its documents with answers and values, `groups` each group to its tasks.
        """
        from lm_eval import evaluator

        evaluator.add_env_info = lambda storage: None  # it lists the machine's packages, a second each time
        evaluator.get_git_commit_hash = lambda: None  # git would complain on the terminal outside of a checkout
        job, settings = self.job, self.job.settings(name)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        said: Any = evaluator.simple_evaluate(
            model=lm,
            tasks=[name],
            num_fewshot=settings.num_fewshot,
            batch_size=job.batch_size,
            limit=settings.limit,
            bootstrap_iters=job.bootstrap,
            apply_chat_template=job.apply_chat_template,
            gen_kwargs=settings.generation or None,
            task_manager=self.manager,
            confirm_run_unsafe_code=job.confirm_run_unsafe_code,
            **dict.fromkeys(seeds, job.seed),
        )
        return _plain(
            {
                "tasks": {task: _figures(said, task) for task in said["results"]},
                "samples": said["samples"],
                "groups": {group: list(_leaves(said, group)) for group in said.get("groups", {})},
            }
        )


def _files_beside(yaml_path: Path, config: dict[str, Any]) -> list[Path]:
    """Return the Python files beside a task's file, which its functions may come from, and its own data files."""
    if "site-packages/lm_eval" in yaml_path.as_posix():
        return []
    options = config.get("dataset_kwargs") or {}
    data = options.get("data_files") or []
    while isinstance(data, dict):
        data = [path for paths in data.values() for path in ([paths] if isinstance(paths, str) else paths)]
    named = [Path(path) for path in ([data] if isinstance(data, str) else data)]
    folders = [Path(place) for place in (config.get("dataset_path"), options.get("data_dir")) if place]
    named += [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    return [*yaml_path.parent.glob("*.py"), *(path for path in named if path.is_file())]


def _leaves(said: dict[str, Any], group: str) -> Iterator[str]:
    for member in said["group_subtasks"].get(group, []):
        if member in said["samples"]:
            yield member
        else:
            yield from _leaves(said, member)


def _figures(said: dict[str, Any], task: str) -> dict[str, Any]:
    """Return version, number of documents and metrics of one task; a metric of a filter other than `none` names it."""
    better = said["higher_is_better"].get(task, {})
    figures = {}
    for key, value in said["results"][task].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = said["results"][task].get(f"{metric}_stderr,{filtered}")
        figures[_named(metric, filtered)] = {
            "metric": metric,
            "filter": filtered,
            "higher_is_better": better.get(metric),
            "value": value,
            "error": error if isinstance(error, int | float) else None,
        }
    samples = said["results"][task].get("sample_len")
    return {"version": said["versions"].get(task), "samples": samples, "metrics": figures}


def _named(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _plain(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    def as_list(one: Any) -> Any:  # the harness would write an array as the text that numpy prints
        return one.tolist() if hasattr(one, "tolist") else handle_non_serializable(one)

    text = json.dumps(value, default=as_list, ensure_ascii=False)
    return json.loads(text.encode("utf-8", "replace"))  # a server may cut an answer within a character


def reason(error: BaseException) -> str:
    """Return the first line of what went wrong."""
    return re.split(r"\n", str(error).strip(), maxsplit=1)[0] or type(error).__name__
