"""Prediction: what a recipe will take of a device's memory, part by part, and of time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdlm.plan.devices import CONTEXT, FRAGMENTATION, HOST_LINK, LAUNCH, OF_BANDWIDTH, OF_PEAK, Device, resident
from kdlm.plan.ledger import Work
from kdlm.plan.settings import Settings
from kdlm.plan.step import Traced, trace
from kdlm.recipe import Recipe

PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "copies",
    "loss",
    "teacher weights",
    "teacher activations",
    "cache",
    "rollouts",
    "gathered",
    "communication",
    "framework",
)
"""What memory is told by: the student (and what trains beside it), its gradients, the optimiser's state, what forward
keeps for backward, its weights in half precision beside those in single, buffers and gradients of the losses, the
teacher, signals read or made ahead of the step, the student's own text, what a rank gathers of others' shares, buffers
in which ranks sum gradients, and Python, libraries and allocator."""
MICRO = ("teacher forward", "student forward", "loss", "backward")
"""Phases of a micro-batch."""


@dataclass(frozen=True)
class Prediction:
    """What is foreseen of a run.

    Attributes:
        device: that it is foreseen for.
        settings: the shapes of a step.
        phases: bytes by phase of a step and part, each at the phase's own peak, without the framework.
        peak: the phase that needs the most.
        parts: bytes by part at that moment, framework among them; they add up to `total`.
        tokens: of an optimiser step, on all ranks.
        seconds: of each phase in an optimiser step, of all its micro-batches; None where a rate of the device is not
            known.
        flops: of an optimiser step.
        traced: what it was foreseen from.
    """

    device: Device
    settings: Settings
    phases: Mapping[str, Mapping[str, int]]
    peak: str
    parts: Mapping[str, int]
    tokens: int
    seconds: Mapping[str, float] | None
    flops: float
    traced: Traced = field(repr=False)

    @property
    def host(self) -> int:
        """Bytes of the teacher that rest in the host's memory, and go to the device once in an optimiser step."""
        return self.traced.host

    @property
    def student_flops(self) -> float:
        """Model FLOPs of the student in an optimiser step: forward and backward, nothing that is computed twice.

        A backward pass is two forward passes, or one where few of the weights are trained.
        """
        student = self.traced.student
        forward = self._forward("student forward") + 2 * student.head * self.settings.rows * self.settings.accumulation
        return forward * (3 if 2 * student.trained > student.everything else 2)

    @property
    def teacher_flops(self) -> float:
        """FLOPs of the teacher's forward pass in an optimiser step, where it is done here."""
        if (teacher := self.traced.teacher) is None:
            return 0.0
        ahead = self.traced.phases.get("teacher's turn")
        body = self._forward("teacher forward") if ahead is None else ahead.work.flops
        return body + 2 * teacher.head * self.settings.rows * self.settings.accumulation

    def _forward(self, phase: str) -> float:
        found = self.traced.phases.get(phase)
        return 0.0 if found is None else found.work.flops * self.settings.accumulation

    @property
    def total(self) -> int:
        """Bytes at the peak, everything counted."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Bytes of the tensors at the peak."""
        return self.total - self.parts["framework"]

    @property
    def fits(self) -> bool:
        return self.total <= self.device.memory

    @property
    def step_seconds(self) -> float | None:
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step_seconds is None else self.tokens / self.step_seconds

    @property
    def hours(self) -> float | None:
        """Hours of the run, without evaluation; None where its steps or the device's rates are not known."""
        if self.step_seconds is None or self.settings.steps is None:
            return None
        return self.settings.steps * self.step_seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints: bytes, seconds, tokens."""
        settings = self.settings
        return {
            "device": {"name": self.device.name, "memory": self.device.memory, "rates_measured": self.device.measured},
            "step": {
                "sequences": settings.batch,
                "length": settings.length,
                "accumulation": settings.accumulation,
                "tokens": self.tokens,
                "flops": self.flops,
            },
            "memory": {
                "total": self.total,
                "fits": self.fits,
                "host": self.host,
                "peak": self.peak,
                "parts": dict(self.parts),
                "phases": {name: dict(parts) for name, parts in self.phases.items()},
            },
            "speed": {
                "seconds": None if self.seconds is None else dict(self.seconds),
                "tokens_per_second": self.tokens_per_second,
                "hours": self.hours,
            },
        }


def predict(recipe: Recipe, device: Device, *, ranks: int = 1) -> Prediction:
    """Return what a recipe will take of a device; `ranks` processes share the tokens of a step and nothing else.

    Raises ValueError for what plan does not cover.
    """
    import kdlm.train  # noqa: F401  the process of a run has it, and so is as large as that

    before = resident()
    settings = Settings.of(recipe, device)
    traced = trace(recipe, settings)
    phases = {name: {part: found.parts[part] for part in PARTS} for name, found in traced.phases.items()}
    peak = largest(phases)
    framework = before if device.kind == "cpu" else on_gpu(phases[peak])
    works = {name: found.work for name, found in traced.phases.items() if name not in ("start", "evaluation")}
    times = {name: settings.accumulation if name in MICRO else 1 for name in works}
    each = {name: _seconds(work, settings) for name, work in works.items()}
    seconds = {name: times[name] * one for name, one in each.items() if one is not None}
    if traced.host:
        seconds["moving the teacher"] = traced.host / HOST_LINK
    return Prediction(
        device=device,
        settings=settings,
        phases=phases,
        peak=peak,
        parts={**phases[peak], "framework": framework},
        tokens=settings.batch * settings.length * settings.accumulation * ranks,
        seconds=None if None in each.values() else seconds,
        flops=sum(times[name] * work.flops for name, work in works.items()),
        traced=traced,
    )


def largest(phases: Mapping[str, Mapping[str, int]]) -> str:
    """Return the phase that needs the most."""
    return max(phases, key=lambda name: sum(phases[name].values()))


def on_gpu(parts: Mapping[str, int]) -> int:
    """Return what a GPU needs beyond the tensors of these parts."""
    return int(CONTEXT + FRAGMENTATION * sum(parts.values()))


def _seconds(work: Work, settings: Settings) -> float | None:
    """Return the time that work takes: products at the device's rate, and all else as fast as memory is read.

    A GPU cannot be faster than Python starts its operations.
    """
    device = settings.device
    rate = device.single if settings.autocast is None else device.half
    if rate is None or device.bandwidth is None:
        return None
    if device.measured:
        return work.flops / rate + work.bytes / device.bandwidth
    return max(work.flops / (rate * OF_PEAK) + work.bytes / (device.bandwidth * OF_BANDWIDTH), work.calls * LAUNCH)
