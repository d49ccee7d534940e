"""What a run shows while it runs: a rich progress bar on a terminal, plain lines elsewhere, and `metrics.jsonl`."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

SHOWN_ELSEWHERE = frozenset(
    {"epoch", "step", "grad_norm", "learning_rate", "tokens_per_second", "total_flos", "memory_gib"}
)


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
        """Return the means over the steps that had each, the pace, and the memory of this process.

        `reduced` sums values over the ranks.
        """
        sums = {name: value.item() for name, value in reduced(self.sums).items()}
        pace = sums.pop("count") / (time.perf_counter() - self.began)
        means = {name: total / self.had[name] for name, total in sums.items()}
        return {f"{self.unit}_per_second": pace, "memory_gib": memory_gib(), **means}


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
            self.progress.update(self.task, said=f"{said}{memory(logs)}")
            return
        place = f"step {state.global_step}/{state.max_steps}"
        left = "" if "loss" not in logs else f"  eta {self._left(state)}{memory(logs)}"
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


def memory(logs: Mapping[str, Any]) -> str:
    """Return what a log line says of the memory in use."""
    gpu = " gpu" if torch.cuda.is_available() else ""
    return f"  {logs['memory_gib']:.1f} GiB{gpu}" if "memory_gib" in logs else ""


def memory_gib() -> float:
    """Return the memory in use, in GiB: on a GPU the peak since this was last asked, else the resident set."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def log_figures(trainer: Trainer, draw: Callable[[], Mapping[str, bytes]]) -> None:
    """Put pictures of a finished run where the run reported to: tensorboard, trackio. Nothing is drawn for neither.

    Args:
        trainer: whose run is over.
        draw: gives PNGs by name.
    """
    on_tensorboard, on_trackio = (
        next((one for one in trainer.callback_handler.callbacks if isinstance(one, kind)), None)
        for kind in (TensorBoardCallback, TrackioCallback)
    )
    if on_tensorboard is None and on_trackio is None:
        return
    if not (drawn := draw()):
        return
    if find_spec("PIL") is None:
        print("the figures of the run are not put into trackers without Pillow: pip install pillow", file=sys.stderr)
        return
    from PIL import Image

    pictures = {name: Image.open(BytesIO(png)).convert("RGB") for name, png in drawn.items()}
    step, args = trainer.state.global_step, trainer.args
    if on_tensorboard is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(on_tensorboard.logging_dir) as writer:
            for name, picture in pictures.items():
                writer.add_image(f"figures/{name}", numpy.asarray(picture), step, dataformats="HWC")
    if on_trackio is not None:
        import trackio

        trackio.init(project=args.project, name=args.run_name, space_id=args.trackio_space_id, resume="must")
        trackio.log({f"figures/{name}": trackio.Image(picture) for name, picture in pictures.items()})
        trackio.finish()
