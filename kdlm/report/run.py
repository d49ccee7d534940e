"""A run folder as it lies on disk: read for the report, whatever state it is in."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdlm.report.markup import visible
from kdlm.yaml_document import Document

Points = list[tuple[int, float]]
"""Steps and what was read at them. A value may be nan or infinite, as it was logged."""

NO_READING = frozenset({"step", "epoch", "total_flos"})
TIMES = ("_runtime", "_per_second")


@dataclass(frozen=True)
class Run:
    """What one `kdlm train` left behind.

    Attributes:
        path: the folder.
        name: what the report calls it.
        recipe, environment, data, results: its files; empty where one is missing.
        lines: of `metrics.jsonl`, without those that a resumed run wrote anew.
        segments: 1, and 1 more for each time that it was resumed from an earlier step.
        inspection: tokens of sample texts with what teacher and student said to them (see `kdlm.measuring`), or None.
        notes: what is missing or could not be read, a sentence each.
    """

    path: Path
    name: str
    recipe: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    segments: int = 1
    inspection: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def points(self, key: str) -> Points:
        """Return the steps and values of a reading, in the order of steps; the last one of a step counts."""
        return self._series.get(key, [])

    @cached_property
    def _series(self) -> dict[str, Points]:
        found: dict[str, dict[int, float]] = {}
        for line in self.lines:
            for key, value in line.items():
                if is_number(value):
                    found.setdefault(key, {})[line["step"]] = value
        return {key: sorted(values.items()) for key, values in found.items()}

    def readings(self, prefix: str = "") -> list[str]:
        """Return the names of the readings over steps that begin with `prefix`, in the order of the log."""
        names = dict.fromkeys(key for line in self.lines if "train_runtime" not in line for key in line)
        return [
            name
            for name in names
            if name.startswith(prefix) and name not in NO_READING and not name.endswith(TIMES) and self.points(name)
        ]

    @property
    def finished(self) -> bool:
        return bool(self.results)

    @property
    def steps(self) -> int:
        """Return the last step that something was logged at."""
        return max([int(self.results.get("steps", 0)), *(line["step"] for line in self.lines)])

    @property
    def final(self) -> dict[str, float]:
        """Return the held-out figures by name, of the finished run or else of its last evaluation."""
        last = self.results if any(key.startswith("eval_") for key in self.results) else {}
        if not last:
            last = next((line for line in reversed(self.lines) if any(key.startswith("eval_") for key in line)), {})
        return {
            key.removeprefix("eval_"): float(value)
            for key, value in last.items()
            if key.startswith("eval_") and is_number(value) and not key.endswith(TIMES)
        }

    @property
    def seconds(self) -> float | None:
        """Return the time that training took, evaluation included; None where no segment came to its end."""
        spent = [line["train_runtime"] for line in self.lines if is_number(line.get("train_runtime"))]
        return sum(spent) if spent else None

    @property
    def seen(self) -> float | None:
        """Return about how many tokens it has trained on: the epochs done times the tokens of one."""
        epochs = max((line["epoch"] for line in self.lines if is_number(line.get("epoch"))), default=None)
        tokens = sum(source.get("trained_tokens", 0) for source in self.data.get("train", []))
        return epochs * tokens if epochs is not None and tokens else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders, each once. Raises ValueError, naming it, for a folder that holds no run."""
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def run_folders(paths: Iterable[str | Path]) -> list[str | Path]:
    """Return the paths, with the run folders of the stages that have begun in place of that of a run of stages.

    Raises ValueError for one of which no stage has begun to train.
    """
    found: list[str | Path] = []
    for path in paths:
        names = [stage["name"] for stage in _stages(path)]
        begun = [Path(path) / name for name in names if (Path(path) / name / "recipe.yaml").is_file()]
        if names and not begun:
            raise ValueError(f"{path}: no stage of this run has begun to train: there is nothing to show yet")
        found += begun or [path]
    return found


def made(path: str | Path) -> Iterable[str]:
    """Yield a sentence for each stage of a run of stages that makes rows or captures signals."""
    for stage in _stages(path):
        name, folder = stage["name"], Path(path) / stage["name"]
        if "pipeline" in stage:
            steps = _object(folder / "about.json", []).get("steps")
            done = f"{steps[-1]['rows']} rows, {folder / 'report.md'} says how" if steps else "not finished"
            yield f"stage {name}: pipeline, {done}"
        elif "capture" in stage:
            whose = _object(folder / "store" / "capture.json", []).get("teacher")
            ended = _object(folder / "stage.json", []).get("leaves") is not None
            yield f"stage {name}: capture{f' of {whose}' if whose else ''}{'' if ended else ', not finished'}"


def _stages(path: str | Path) -> list[dict[str, Any]]:
    """Return the stages of a run of stages; of another path none."""
    whole = Path(path) / "stages.yaml"
    return Document.read(whole).data["stages"] if whole.is_file() else []


def read_run(path: Path, name: str = "") -> Run:
    """Read one run folder; what is missing in it becomes a note. Raises ValueError where it holds no recipe."""
    if not (path / "recipe.yaml").is_file():
        raise ValueError(
            f"{path}: no run: expected a folder with recipe.yaml and metrics.jsonl, as kdlm train makes it"
        )
    recipe = Document.read(path / "recipe.yaml").data
    if not isinstance(recipe, dict):
        raise ValueError(f"{path / 'recipe.yaml'}: expected the keys and values of a recipe")
    notes: list[str] = []
    files = {key: _object(path / f"{key}.json", notes) for key in ("environment", "data", "results")}
    lines, segments = _lines(path / "metrics.jsonl", notes)
    if lines and not files["results"]:
        notes.append("not finished: figures are those of its last evaluation")
    if segments > 1:
        notes.append(f"resumed {segments - 1} times" if segments > 2 else "resumed once")
    inspection = _object(path / "inspection.json", []) or None
    return Run(
        path,
        visible(name or path.name),
        recipe,
        **files,
        lines=lines,
        segments=segments,
        inspection=inspection,
        notes=notes,
    )


def _names(folders: Sequence[Path]) -> Iterable[str]:
    """Return the shortest ends of the paths that tell them apart."""
    for parts in range(1, 20):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return map(str, folders)


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} could not be read")
    return {}


def _lines(path: Path, notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the log lines and in how many segments they were written; a line cut short by a kill is left out."""
    if not path.is_file():
        notes.append("nothing was logged yet")
        return [], 1
    lines: list[dict[str, Any]] = []
    segments, lost = 1, 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, KeyError, TypeError):
            lost += 1
            continue
        if not isinstance(step, int):
            lost += 1
        elif lines and step < lines[-1]["step"]:
            lines, segments = [line_ for line_ in lines if line_["step"] < step], segments + 1
            lines.append(line)
        else:
            lines.append(line)
    if lost:
        notes.append(f"{lost} lines of the log could not be read" if lost > 1 else "a line of the log was cut short")
    return lines, segments
