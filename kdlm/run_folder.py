"""The run folder: what a run was, what it measured, and the student it left behind."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdlm import checkpoints
from kdlm.disk import flush, write_text
from kdlm.estimates import written
from kdlm.markdown import table
from kdlm.metrics import metric
from kdlm.models import SyntheticImages
from kdlm.privacy import promise
from kdlm.quality import grid, write_image_folder, write_png
from kdlm.recipe import Recipe, load, resolved
from kdlm.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("kdlm", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "bitsandbytes", "triton")


MAY_CHANGE = ("training.", "run_dir", "guards", "teacher.placement", "teacher.device", "teacher.batch_size")
"""Keys that a resumed run may have with other values: where the teacher is does not change what is learnt."""


class RunFolder:
    """`recipe.yaml`, `environment.json`, `data.json`, `metrics.jsonl`, `checkpoint-*/`, `results.json`, `student/`."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.student = path / "student"

    def starting_point(self, recipe: Recipe, resume: bool | str) -> Path | None:
        """Return the checkpoint to go on from, or None to start.

        Raises ValueError when the folder holds another run, or one that was not asked to be resumed.
        """
        described = self.path / "recipe.yaml"
        if not resume:
            if described.exists() or checkpoints.finished(self.path):
                raise ValueError(
                    f"run_dir: {self.path} already holds a run; go on with --resume or choose another folder"
                )
            return None
        if described.exists():
            self._compare(described, recipe)
        if isinstance(resume, str):
            folder = Path(resume)
            checkpoints.step_of(folder)
            checkpoints.verify(folder)
            return folder
        found = checkpoints.finished(self.path)
        return found[-1] if found else None

    def _compare(self, described: Path, recipe: Recipe) -> None:
        changed = changes(load(described), recipe)
        if wrong := [key for key in changed if not key.startswith(MAY_CHANGE)]:
            before, now = changed[wrong[0]]
            raise ValueError(
                f"{wrong[0]}: {now!r} differs from {before!r} of the run in {self.path}"
                f"{f' (and {len(wrong) - 1} more keys)' if len(wrong) > 1 else ''}: a resumed run must be the same run"
            )
        for key, (before, now) in changed.items():
            print(f"resuming with a changed {key}: {before!r} -> {now!r}", file=sys.stderr)

    @property
    def newest(self) -> Path:
        """The last finished checkpoint."""
        return checkpoints.finished(self.path)[-1]

    @property
    def stopped(self) -> bool:
        """Whether a guard ended the run."""
        return "stopped" in json.loads((self.path / "results.json").read_text())

    def open(
        self, recipe: Recipe, data: Mapping[str, Any], step: int, placement: Mapping[str, Any] | None = None
    ) -> None:
        """Create the folder, write what the run is and where its teacher is, and cut the metrics back to `step`."""
        write_text(self.path / "recipe.yaml", resolved(recipe))
        ran_on = environment() | ({} if placement is None else {"teacher_placement": placement})
        write_text(self.path / "environment.json", json.dumps(ran_on, indent=1))
        write_text(self.path / "data.json", json.dumps(data, indent=1, default=str))
        if self.metrics.exists():
            lines = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in lines))

    def export(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        card: str,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        """Write the student as a folder that its kind opens (a plain Hugging Face one of a transformers model).

        A student that is a set of images is there to be seen too (see `draw`), where Pillow is installed. It replaces
        an older one in one move. `beside` are texts that are written with it, by file name.
        """
        incoming, outgoing = self.path / ".student.incoming", self.path / ".student.outgoing"
        for leftover in (incoming, outgoing):
            shutil.rmtree(leftover, ignore_errors=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(incoming)
        else:
            checkpoints.save_module(model, incoming)
        if isinstance(model, SyntheticImages) and find_spec("PIL") is not None:
            draw(model, incoming)
        if tokenizer is not None:
            tokenizer.save_pretrained(incoming)
        for name, text in {"README.md": card, **(beside or {})}.items():
            (incoming / name).write_text(text, encoding="utf-8")
        flush(incoming)
        if self.student.exists():
            os.replace(self.student, outgoing)
        os.replace(incoming, self.student)
        shutil.rmtree(outgoing, ignore_errors=True)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the figures of the finished run."""
        write_text(self.path / "results.json", json.dumps(results, indent=1))


def changes(before: Section, now: Section) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two recipes or pipelines differ, sorted, with both values.

    None stands where there is no such key.
    """
    old, new = _flat(before), _flat(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def draw(student: SyntheticImages, folder: Path) -> None:
    """Write a set of images as `sheet.png`, and one by one below `images`, as the data section `images` reads them.

    Values are clipped to [-1, 1] and rounded to 8 bits; `model.safetensors` keeps them as they were learned.
    """
    per_class = len(student.labels) // student.num_classes
    across = per_class if per_class > 1 else student.num_classes  # a row for each class, or one row of all
    write_png(folder / "sheet.png", grid(student.pixel_values, across))
    write_image_folder(folder / "images", student.pixel_values, student.labels)


def environment() -> dict[str, Any]:
    """Return what the run ran on: packages, devices, processes."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def model_card(recipe: Recipe, data: str, results: Mapping[str, Any]) -> str:
    """Return the student's README.md: teacher, data, loss and figures."""
    teacher = "none" if recipe.teacher is None else _name(recipe.teacher)
    losses = ", ".join(_summary(loss) for loss in recipe.losses) or "the method's own"
    figures = [
        (metric(key).label, written(value * metric(key).scale))
        for key, value in results.items()
        if key.startswith("eval_") and isinstance(value, float) and "per_second" not in key and "runtime" not in key
    ]
    best = results.get("best", {"step": None})
    chosen = "the last" if best["step"] is None else f"step {best['step']}, the best by {best['metric']}"
    held_out = table(["held-out", "value"], figures) if figures else "Not evaluated: the recipe has no held-out data."
    about = [
        ("student", _name(recipe.student)),
        ("teacher", teacher),
        ("method", _summary(recipe.method)),
        ("losses", losses),
        *([] if recipe.sparsity is None else [("sparsity", recipe.sparsity.describe())]),
        ("optimiser steps", f"{results.get('steps', '?')}"),
        ("checkpoint", chosen),
        ("seed", f"{recipe.seed}"),
    ]
    data = _named(recipe.data) if "privacy" in results else data
    sources = "\n".join(f"- {line.strip()}" for line in data.splitlines())
    private = f"\n## Privacy\n{promise(results['privacy'])}\n" if "privacy" in results else ""
    return f"""---
library_name: transformers
tags: [distillation, kdlm]
---
# {recipe.run_dir.name}

A student distilled with kdlm {version("kdlm")}.

{table(["", ""], about)}

## Data
{sources}
{private}
## Figures
{held_out}

Values are means per held-out token or image, natural logarithms. The whole recipe is `recipe.yaml` of the run folder.
"""


def _named(data: Any) -> str:
    """Name the sources of private text alone: how many tokens a row added would be told without noise."""
    splits = {"train": data.train, "eval": data.eval or []}
    return "\n".join(f"{split}: {source.path}" for split, sources in splits.items() for source in sources)


def _name(section: Any) -> str:
    return section.describe() if hasattr(section, "describe") else f"{section.name}: {getattr(section, 'target', '')}"


def _summary(section: Section) -> str:
    options = {key: value for key, value in section if key != "name" and key in section.model_fields_set}
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{section.name} ({said})" if said else section.name


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut short by a kill


def _flat(section: Section) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list) and value:
            for index, inner in enumerate(value):
                walk(inner, f"{key}.{index}")
        else:
            flat[key] = value

    data = section.model_dump(mode="json")
    if isinstance(section, Recipe):
        data["training"] = section.training.model_dump(mode="json", exclude_unset=True)
    walk(data, "")
    return flat
