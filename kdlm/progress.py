"""What a run shows while it runs: a rich progress bar on a terminal, plain lines elsewhere, and `metrics.jsonl`."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import TrainerCallback

SHOWN_ELSEWHERE = frozenset({"epoch", "step", "grad_norm", "learning_rate", "tokens_per_second", "total_flos"})


class Window:
    """Sums what the steps since the last log line measured; the values stay on their device until the line is due.

    What some steps only measure (those on one of two texts) is averaged over these.
    """

    def __init__(self, unit: str = "tokens"):
        self.unit = unit
        self.had: dict[str, int] = defaultdict(int)
        self.sums: dict[str, Tensor] = defaultdict(partial(torch.zeros, ()))
        self.steps, self.began = 0, time.perf_counter()

    def add(self, means: Mapping[str, Tensor], count: Tensor) -> None:
        """Take in one optimiser step: this rank's share of its means, and of the units it trained on."""
        for name, value in {**means, "count": count}.items():
            self.sums[name] = self.sums[name] + value
            self.had[name] += 1
        self.steps += 1

    def readings(self, reduced: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, float]:
        """Return the means over the steps that had each, and the pace; `reduced` sums values over the ranks."""
        sums = {name: value.item() for name, value in reduced(self.sums).items()}
        pace = sums.pop("count") / (time.perf_counter() - self.began)
        return {f"{self.unit}_per_second": pace, **{name: total / self.had[name] for name, total in sums.items()}}


class MetricsFile(TrainerCallback):
    """Appends every log line to `metrics.jsonl`, one JSON object each, with the step."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Display(TrainerCallback):
    """Shows steps, pace, time left, losses by name and memory; at the start the `plan` of a run of so many steps."""

    def __init__(self, console: Console | None = None, plan: Callable[[int], list[str]] | None = None):
        self.console = console or Console(stderr=False)
        self.plan = plan
        self.progress: Progress | None = None
        self.began, self.first = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.plan is not None:
            self.console.print("\n".join(self.plan(state.max_steps)), highlight=False, soft_wrap=True)
        if state.is_world_process_zero and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
                console=self.console,
            )
            self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, said="")
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        said = readable(logs)
        if self.progress is not None and "loss" in logs:
            self.progress.update(self.task, said=f"{said}  {memory()}")
            return
        place = f"step {state.global_step}/{state.max_steps}"
        left = "" if "loss" not in logs else f"  eta {self._left(state)}  {memory()}"
        self.console.print(f"{place}  {said}{left}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _left(self, state: Any) -> timedelta:
        done = max(1, state.global_step - self.first)
        return timedelta(seconds=round((time.monotonic() - self.began) / done * (state.max_steps - state.global_step)))


def readable(logs: Mapping[str, Any]) -> str:
    """Return the named values of a log line, losses first, pace last."""
    parts = [
        f"{name} {value:.4g}"
        for name, value in logs.items()
        if isinstance(value, int | float)
        and name not in SHOWN_ELSEWHERE
        and not name.endswith(("_per_second", "_runtime"))
    ]
    for unit in ("tokens", "images", "samples"):
        if f"{unit}_per_second" in logs:
            parts.append(f"{logs[f'{unit}_per_second']:,.0f} {unit}/s")
    return "  ".join(parts)


def memory() -> str:
    """Return the memory in use: the peak on the GPU where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB gpu"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
