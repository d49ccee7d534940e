"""harness: what kdlm asks of lm-evaluation-harness, and keeps it from doing.

Its import takes seconds, so it happens inside of functions.
"""

import contextlib
import json
import logging
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


@contextlib.contextmanager
def told_to(path: Path) -> Iterator[None]:
    """Send what the harness logs, prints and draws as bars to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


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

        folders = [str(folder) for folder in self.job.folders()]
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=self.told)
        if all(name in manager.task_index for name in self.job.tasks):
            return manager
        return TaskManager(include_path=folders, metadata=self.told)

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
                    f"tasks.{name}: it runs what a model wrote, with nothing around it: in a machine that may break, "
                    "set confirm_run_unsafe_code: true"
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
    data = (config.get("dataset_kwargs") or {}).get("data_files") or []
    while isinstance(data, dict):
        data = [path for paths in data.values() for path in ([paths] if isinstance(paths, str) else paths)]
    named = [Path(path) for path in ([data] if isinstance(data, str) else data)]
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

    return json.loads(json.dumps(value, default=handle_non_serializable))


# The models. Each counts a text's likelihood from one beginning token on, its own: HFLM and its kin would let a
# tokenizer that adds a beginning put a second one behind it, and count that as text.


class _Rolling:
    """Reads whole texts without a beginning that the tokenizer adds: the harness puts one there already."""

    add_bos_token: bool | None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        kept, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)  # pyright: ignore
        finally:
            self.add_bos_token = kept


def hf(model: Any, tokenizer: Any, batch_size: int | str, max_length: int | None) -> Any:
    """Return a loaded model as the harness asks it."""
    from lm_eval.models.huggingface import HFLM

    class InProcess(_Rolling, HFLM):
        pass

    return InProcess(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def vllm(path: str, **options: Any) -> Any:
    """Return a model in vLLM as the harness asks it. Raises ImportError where there is no vLLM."""
    from lm_eval.models.vllm_causallms import VLLM

    class InEngine(_Rolling, VLLM):
        pass

    return InEngine(pretrained=path, **options)


def server(section: Any, tokenizer: Any, key: str | None, *, max_length: int, batch_size: int | str, seed: int) -> Any:
    """Return a served model as the harness asks it: `local-completions`, or `local-chat-completions`."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    class Completions(_Rolling, LocalCompletionsAPI):
        pass

    class Chat(LocalChatCompletion):
        pass

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # one request's failure is told; not each of the others'
    for kind in (Completions, Chat):  # the harness would send a vendor's key, $OPENAI_API_KEY, to any server
        kind.header = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = section.url.rstrip("/")
    options: dict[str, Any] = {
        "model": section.model,
        "max_length": max_length,
        "seed": seed,
        "num_concurrent": section.concurrency,
        "timeout": round(section.timeout),
        "max_retries": tries(section.patience),
    }
    if section.chat:
        return Chat(base_url=f"{url}/v1/chat/completions", tokenizer_backend=None, batch_size=1, **options)
    return Completions(
        base_url=f"{url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=tokenizer.location(),
        add_bos_token=adds_beginning(tokenizer.tokenizer()),
        batch_size=1 if batch_size == "auto" else batch_size,
        **options,
    )


def adds_beginning(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a beginning before a text, as HFLM lets it and the harness's API models do not."""
    return bool(tokenizer("").input_ids)


def tries(patience: float) -> int:
    """Return how many tries fit into some seconds with the harness's pauses of 1, 1, 2, 4, 8, 10, 10 ... seconds."""
    made, spent = 1, 0.0
    while spent < patience:
        spent += min(10.0, max(1.0, 0.5 * 2 ** (made - 1)))
        made += 1
    return made


def reason(error: BaseException) -> str:
    """Return the first line of what went wrong."""
    return re.split(r"\n", str(error).strip(), maxsplit=1)[0] or type(error).__name__
