"""running: evaluate what is not in the cache, model by model."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdlm.jobs.cache import Cache
from kdlm.jobs.digests import digest
from kdlm.jobs.distillation import distilled, teacher_of
from kdlm.jobs.harness import Tasks, reason
from kdlm.jobs.job import Job
from kdlm.jobs.log import told_to
from kdlm.jobs.models import Server
from kdlm.jobs.speed import measure

LOG = "lm_eval.log"

Say = Callable[[str], None]


@dataclass
class Answers:
    """What a model gave.

    Attributes:
        hash: of weights, configuration, tokenizer and the way they are opened.
        about: `parameters` and `bytes`, None where they are not known.
        results: by task of the job, what `Tasks.evaluate` returns.
    """

    hash: str
    about: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(job: Job, say: Say) -> dict[str, Answers]:
    """Evaluate every model on every task, and return what they gave.

    A model is opened only where something of it is not kept. Each result is kept as soon as it is there, so that a
    job that was killed goes on with the task it was at. Raises ValueError that names the key, for what cannot be done.
    """
    _check(job)
    cache, log = Cache(job.cache), job.output / LOG
    log.unlink(missing_ok=True)
    with told_to(log, "reading the tasks"):
        tasks = Tasks(job)
        tasks.check()
        identities = {task: tasks.identity(task) for task in job.tasks}
    models = {name: digest(model.identity(f"models.{name}", cache.memory)) for name, model in job.models.items()}
    given = {}
    for name, model in models.items():
        given[name] = answers = Answers(model)
        kept = {task: _read(cache, cache.path(model, task, identities[task]), say) for task in job.tasks}
        answers.about = _read(cache, cache.path(model, "model"), say) or {"parameters": None, "bytes": None}
        answers.results = {task: result for task, result in kept.items() if result is not None}
        if missing := {task: identities[task] for task in job.tasks if task not in answers.results}:
            _ask(job, cache, name, answers, missing, say)
    return given


def _check(job: Job) -> None:
    """Raise ValueError, naming the key, for what would only come to light after hours."""
    for name, model in job.models.items():
        if isinstance(model, Server) and model.chat and not job.apply_chat_template:
            raise ValueError(f"models.{name}.chat: a chat endpoint takes turns only: set apply_chat_template: true")
    if job.distillation is not None:
        teacher_of(job, job.distillation)
    if job.speed is not None and not job.here():
        raise ValueError("speed: it is that of models in this process (name: hf), and there are none")


def _read(cache: Cache, path: Path | None, say: Say) -> Any:
    try:
        return cache.read(path)
    except ValueError as error:
        say(f"{error}: made again")
        return None


def _ask(job: Job, cache: Cache, name: str, answers: Answers, missing: dict[str, Any], say: Say) -> None:
    """Open a model, ask it the tasks that are missing, keep what it says, and let it go."""
    section, place, log = job.models[name], f"models.{name}", job.output / LOG
    with told_to(log, f"{name}: opening"):
        lm = section.open(place, job.batch_size, job.seed)
        tasks = Tasks(job, section.told())
    answers.about = section.about(lm)
    cache.write(cache.path(answers.hash, "model"), answers.about)
    for task, identity in missing.items():
        began = time.perf_counter()
        try:
            with told_to(log, f"{name}: {task}"):
                result = tasks.evaluate(lm, task)
        except Exception as error:
            raise _explained(error, place, task, log) from error
        cache.write(cache.path(answers.hash, task, identity), result)
        answers.results[task] = result
        say(f"{name}: {task} evaluated in {time.perf_counter() - began:.1f} s")
    del lm
    _free()


def distillation(job: Job, given: dict[str, Answers]) -> dict[str, Any]:
    """Return what `kdlm.jobs.distillation.distilled` says of the job's students and baselines."""
    assert job.distillation is not None
    with told_to(job.output / LOG, "beside the teacher"):
        found = distilled(job, job.distillation, {name: one.hash for name, one in given.items()}, Cache(job.cache))
    _free()
    return found


def speed(job: Job) -> dict[str, Any]:
    """Return what `kdlm.jobs.speed.measure` says of the models of this process, and how much disk each takes.

    Raises ValueError for what cannot be measured.
    """
    assert job.speed is not None
    sections = job.here()
    with told_to(job.output / LOG, "speed: opening"):
        models = {name: section.load(f"models.{name}")[0] for name, section in sections.items()}
    found = measure(job.speed, models, next((name for name in job.of("teacher") if name in models), None))
    del models
    _free()
    return {name: {"bytes": sections[name].bytes(), **measured} for name, measured in found.items()}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _explained(error: Exception, place: str, task: str, log: Path) -> Exception:
    """Return an error that names the key at fault, for what may go wrong in the harness."""
    kind = type(error).__module__.split(".")[0]
    if kind in ("requests", "aiohttp", "asyncio"):
        return ValueError(f"{place}.url: {reason(error)} (while it answered {task}; what was done before is kept)")
    if isinstance(error, NotImplementedError):
        return ValueError(f"tasks.{task}: {place} cannot answer it: {reason(error)}")
    if isinstance(error, ConnectionError | FileNotFoundError) or kind in ("datasets", "huggingface_hub"):
        return ValueError(
            f"tasks.{task}: its data are not here and cannot be had: {reason(error)} (HF_HUB_OFFLINE=1 keeps the hub "
            "away; the tasks of eval/tasks need none)"
        )
    if isinstance(error, ValueError | KeyError | ImportError):
        return ValueError(f"tasks.{task}: {reason(error)} (more in {log})")
    return error
