"""What to change where a run does not fit: each change is planned, so that what it saves is calculated."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kdlm.methods import TokenMethod
from kdlm.plan.devices import Device
from kdlm.plan.prediction import Prediction, predict
from kdlm.recipe import Recipe
from kdlm.teachers import LocalTeacherSection, SandboxTeacherSection

LEAST = 0.005
"""Share of the total that a change must save to be worth a line."""
FEW_ROWS = 256


@dataclass(frozen=True)
class Advice:
    """A change of the recipe.

    Attributes:
        what: in words, with what it costs.
        changes: keys and their values.
        saves: bytes, taken alone.
    """

    what: str
    changes: Mapping[str, Any]
    saves: int

    @property
    def overrides(self) -> str:
        """The changes as one writes them on the command line."""
        return overrides(self.changes)


def overrides(changes: Mapping[str, Any]) -> str:
    """Return changes as one writes them on the command line."""
    written = {key: yaml.safe_dump(value, default_flow_style=True, width=1000) for key, value in changes.items()}
    said = {key: value.strip().removesuffix("...").strip() for key, value in written.items()}
    return " ".join(f"{key}={value}" if " " not in value else f"'{key}={value}'" for key, value in said.items())


def advise(recipe: Recipe, now: Prediction) -> list[Advice]:
    """Return the changes that save memory, those first that change the least of what is learnt."""
    found = []
    for what, changes in _candidates(recipe, now):
        saves = now.total - predict(changed(recipe, changes), now.device).total
        if saves > LEAST * now.total:
            found.append(Advice(what, changes, saves))
    return found


def enough(recipe: Recipe, device: Device, advice: list[Advice]) -> tuple[dict[str, Any], Prediction | None]:
    """Return the first changes that together make the run fit, and what is foreseen with them; None: all do not do."""
    together: dict[str, Any] = {}
    for one in advice:
        if "teacher" in together and any(key.startswith("teacher.") for key in one.changes):
            continue  # it is another teacher by now
        together |= one.changes
        then = predict(changed(recipe, together), device)
        if then.fits:
            return together, then
    return together, None


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other values under some dotted keys."""
    data = recipe.model_dump(mode="json", by_alias=True, exclude={"training"})
    data["training"] = recipe.training.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        *path, last = key.split(".")
        inside = data
        for name in path:
            inside = inside[name]
        inside[last] = value
    return Recipe.model_validate(data)


def _candidates(recipe: Recipe, now: Prediction) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the changes that a recipe has not made yet."""
    settings, gpu = now.settings, now.device.kind == "cuda"
    batch, steps = settings.args.per_device_train_batch_size, settings.accumulation
    if now.peak == "evaluation" and settings.evaluation > 1:
        yield "evaluate one sequence at a time", {"training.per_device_eval_batch_size": 1}
    if settings.autocast is None and gpu and now.device.bf16:
        yield "compute in bfloat16", {"training.bf16": True}
    if isinstance(getattr(recipe.method, "method", None), type) and issubclass(recipe.method.method, TokenMethod):
        if recipe.method.chunk_rows is None or recipe.method.chunk_rows > FEW_ROWS:
            yield "project fewer rows to the vocabulary at once", {"method.chunk_rows": FEW_ROWS}
    if settings.checkpointing is None:
        again = {"training.gradient_checkpointing": True}
        yield "checkpoint activations: each layer's forward runs twice", again
    if batch > 1:
        smaller = {
            "training.per_device_train_batch_size": 1,
            "training.gradient_accumulation_steps": batch * steps,
        }
        yield "one sequence at a time, the same batch by accumulation", smaller
    yield from _of_weights(recipe, gpu)
    yield "sequences of half the length", {"data.max_length": max(2, recipe.data.max_length // 2)}  # pyright: ignore


def _of_weights(recipe: Recipe, gpu: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what can be changed of the teacher, the optimiser and what is trained."""
    teacher, student = recipe.teacher, recipe.student
    if isinstance(teacher, LocalTeacherSection | SandboxTeacherSection) and teacher.device is None:
        if gpu and teacher.placement == "resident" and teacher.quantization == "none":
            yield "the teacher in the host's memory while the student learns", {"teacher.placement": "sliced"}
        if recipe.rollouts is None:
            of = teacher.model_dump(mode="json", exclude_unset=True) | {"name": teacher.name}
            cached = {"name": "cached", "path": "captures/teacher", "of": of}
            yield "capture the teacher's signals first (kdlm capture): the 128 likeliest tokens", {"teacher": cached}
        if gpu and teacher.quantization == "none":
            few = {"teacher.quantization": "4bit", "teacher.placement": "resident"}
            yield "a teacher in 4 bits, whose errors are learnt too (docs/quantisation.md)", few
    optimiser = str(getattr(recipe.training.optim, "value", recipe.training.optim))
    if gpu and optimiser.startswith("adamw_torch"):
        yield "an optimiser with 8 bits of state", {"training.optim": "adamw_bnb_8bit"}
    if getattr(student, "lora", None) is None:
        yield "train adapters in place of all weights", {"student.lora": {"rank": 16}}
