"""speed: tokens per second, first-token latency and memory of the models of this process, measured in turns."""

import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from kdlm.estimates import Estimate, mean
from kdlm.section import Section

READINGS = ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds", "peak_memory_bytes")
"""What is measured of each model at each batch size."""
MEDIAN = 1.2533
"""The standard error of a median over that of a mean, for readings that are normally distributed."""

Reading = dict[str, float]


class Speed(Section):
    """How the speed of the models of this process (`name: hf`) is measured. All of them are in memory together."""

    batch_sizes: list[int] = Field([1, 8], min_length=1)
    """Sequences read and written together; each is measured."""
    prompt_tokens: int = Field(128, ge=1)
    """Tokens of each prompt."""
    new_tokens: int = Field(32, ge=2)
    """Tokens written after it, the most probable ones, with a cache of keys and values."""
    repeats: int = Field(5, ge=2)
    """Turns, after one that does not count; what is told is their median."""


def measure(section: Speed, models: dict[str, Any], teacher: str | None) -> dict[str, Any]:
    """Return, by model and batch size, the medians of READINGS, and their ratios to the teacher's.

    In each turn every model is measured once, in turning order, so that a machine that slows down slows all of them;
    a ratio is the median of the turns' own. The first token comes with reading the prompts; decoding is the tokens
    after it. The prompts are random ids. Peak memory is that of the weights and of what was taken on top of them: on a
    CUDA GPU by torch's count, on a CPU by the resident set (Linux), None elsewhere. Errors are standard errors of the
    medians.

    Args:
        models: causal LMs by name.
        teacher: whose readings are the denominators; None has no ratios.

    Raises ValueError where prompt and answer do not fit a model.
    """
    for name, model in models.items():
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and section.prompt_tokens + section.new_tokens > room:
            raise ValueError(
                f"speed.prompt_tokens: {section.prompt_tokens} and {section.new_tokens} new ones do not fit the {room} "
                f"positions of {name}"
            )
    found: dict[str, Any] = {name: {"batch": {}} for name in models}
    for size in section.batch_sizes:
        turns = list(_turns(section, models, size))
        for name in models:
            readings = [turn[name] for turn in turns]
            found[name]["batch"][str(size)] = {key: _median([r[key] for r in readings]) for key in READINGS}
            if teacher is not None and name != teacher:
                ratios = {key: _median([turn[name][key] / turn[teacher][key] for turn in turns]) for key in READINGS}
                found[name]["batch"][str(size)]["against_teacher"] = ratios
    return found


def _turns(section: Speed, models: dict[str, Any], size: int) -> Iterator[dict[str, Reading]]:
    """Yield the readings of every model, turn by turn, after one turn that is thrown away."""
    names = list(models)
    for turn in range(section.repeats + 1):
        first = turn % len(names)
        readings = {name: _read(section, models[name], size) for name in names[first:] + names[:first]}
        if turn:
            yield readings


@torch.inference_mode()
def _read(section: Speed, model: Any, size: int) -> Reading:
    """Read prompts and write answers once."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (size, section.prompt_tokens), generator=generator).to(model.device)
    memory = _Memory(model)
    _wait(model)
    began = time.perf_counter()
    said = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    ids = said.logits[:, -1:].argmax(-1)
    _wait(model)
    first = time.perf_counter()
    for _ in range(section.new_tokens - 1):
        said = model(input_ids=ids, past_key_values=said.past_key_values, use_cache=True, logits_to_keep=1)
        ids = said.logits[:, -1:].argmax(-1)
    _wait(model)
    ended = time.perf_counter()
    return {
        "prefill_tokens_per_second": size * section.prompt_tokens / (first - began),
        "decode_tokens_per_second": size * (section.new_tokens - 1) / (ended - first),
        "first_token_seconds": first - began,
        "peak_memory_bytes": memory.peak(),
    }


def _wait(model: Any) -> None:
    """Wait for what was asked of an accelerator: its calls return before they are done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


class _Memory:
    """The most memory that a model's weights, and what it does from here on, take together."""

    def __init__(self, model: Any):
        self.device = model.device
        self.resident = self.device.type == "cpu" and _LINUX
        tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
        self.weights = sum(storage.nbytes() for storage in tensors.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: float = torch.cuda.memory_allocated(self.device)
        elif self.resident:
            ctypes.CDLL(None).malloc_trim(0)  # freed pages that malloc keeps would hide what comes now
            self.before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew

    def peak(self) -> float:
        if self.device.type == "cuda":
            return self.weights + torch.cuda.max_memory_allocated(self.device) - self.before
        return self.weights + _resident("VmHWM") - self.before if self.resident else float("nan")


_LINUX = Path("/proc/self/clear_refs").exists()


def _resident(key: str) -> float:
    """Return a field of this process's memory in bytes: VmRSS (now) or VmHWM (the most since it was reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _median(readings: Sequence[float]) -> dict[str, float | None]:
    return Estimate(statistics.median(readings), MEDIAN * mean(readings).error).as_json()
