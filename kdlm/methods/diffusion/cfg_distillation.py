"""Guidance distillation: a student that says in one evaluation what its teacher says under guidance in two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.data import TensorRows
from kdlm.diffusion import AnyTimes, Condition, Draws, Level, LogNormal, Solver, guided
from kdlm.methods.diffusion.method import (
    CONDITIONS,
    DiffusionMethod,
    DiffusionOptions,
    clean_of,
    condition_of,
    draws_of,
)
from kdlm.methods.method import Batch, Nets, Preparation, Step, Term, Terms

PREPARATION = -2
"""The step that the noise of paths is drawn of: no step of the run."""


class GuidanceDistillation(DiffusionMethod):
    """Regression on the guided teacher, its scale an input of the student (arXiv 2210.03142, stage one).

    The scale w of `c + w (c - 0)` is uniform between two ends. What trains is the student's matter: all of it, its
    guidance input (`student.train_only`), a LoRA (`student.lora`).

    Args:
        scales: the ends. A student that takes no scale learns a single one: give it twice.
        states: where the two are compared: `data`, noised samples, or `paths`, the states that the guided teacher
            goes through while it samples (AGD, arXiv 2503.07274), made once before the first step.
        times: noise levels of noised samples.
        solver: how the teacher's paths are followed, and the student is sampled.
        paths: how many; None: one for each training row.
        weighting: of squared errors of x_0: `truncated_snr` is max(1, SNR), the paper's; `uniform` is 1.
        guidance: scale that samples in evaluation are drawn with.
        measured: scales at which evaluation compares the student with the guided teacher.
        **options: as `DiffusionMethod`.
    """

    paper = "arXiv 2210.03142"

    def __init__(
        self,
        *,
        scales: tuple[float, float] = (0.0, 2.0),
        states: Literal["data", "paths"] = "data",
        times: AnyTimes | None = None,
        solver: Solver | None = None,
        paths: int | None = None,
        weighting: Literal["truncated_snr", "uniform"] = "truncated_snr",
        guidance: float = 1.0,
        measured: Sequence[float] = (0.5, 1.0, 2.0),
        **options: Any,
    ):
        super().__init__(**options)
        self.scales, self.states, self.times = scales, states, times or LogNormal()
        self.weighting = weighting
        self.solver, self.paths, self.guidance, self.measured = solver or Solver(), paths, guidance, tuple(measured)

    @property
    def computes(self) -> tuple[str, ...]:
        return ("guidance", *super().computes)

    def prepare(self, context: Preparation) -> TensorRows | None:
        """Return the states of the guided teacher's paths: `noised`, `alpha`, `sigma`, `scale`, what it said there
        (`clean`), `index`, and the conditions that the training rows have."""
        if self.states == "data":
            return None
        total, made = self.paths or len(context.rows), []
        for first in range(0, total, context.batch_size):
            numbers = range(first, min(total, first + context.batch_size))
            rows = context.batch(number % len(context.rows) for number in numbers)
            draws = Draws(torch.tensor(list(numbers), device=context.device), context.seed, PREPARATION)
            for state in self.path(context.nets["teacher"], draws, required(condition_of(rows))):
                made.append(state | {key: rows[key] for key in CONDITIONS if key in rows})
        columns = {key: torch.cat([part[key].cpu() for part in made]) for key in made[0]}
        return TensorRows({**columns, "index": torch.arange(len(columns["noised"]))})

    @torch.no_grad()
    def path(
        self, teacher: Any, draws: Draws, condition: Condition, scale: Float[Tensor, "batch"] | None = None
    ) -> list[dict[str, Tensor]]:
        """Return every state at which the solver asks the guided teacher, with its answer; scales are drawn."""
        w, states = self.drawn(draws) if scale is None else scale, []

        def recorded(noised: Tensor, level: Level) -> Tensor:
            clean = guided(teacher, noised, level, condition, w)
            ends = {"alpha": level.alpha.clone(), "sigma": level.sigma.clone()}
            states.append({"noised": noised, **ends, "scale": w, "clean": clean})
            return clean

        self.solver(recorded, draws.normal("written 0", teacher.shape), teacher.form)
        return states

    def drawn(self, draws: Draws) -> Float[Tensor, "batch"]:
        """Return a scale for each sample."""
        low, high = self.scales
        return low + (high - low) * draws.uniform("scale")

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        condition, draws = required(condition_of(batch)), draws_of(batch, step)
        if "clean" in batch:
            level, noised, scale = Level(batch["alpha"], batch["sigma"]), batch["noised"], batch["scale"]
            target = batch["clean"]
        else:
            level, noised = self.noised(nets, batch, draws)
            scale = self.drawn(draws).to(noised)
            with torch.no_grad():
                target = guided(nets["teacher"], noised, level, condition, scale)
        said = self.asked(nets["student"], scale)(noised, level, condition)
        error = (said - target).square().flatten(1).mean(1)
        weighed = error if self.weighting == "uniform" else level.snr.clamp(min=1) * error
        return Terms({"guidance": Term(weighed.sum(), "samples")})

    def noised(self, nets: Nets, batch: Batch, draws: Draws) -> tuple[Level, Tensor]:
        """Return noised samples of the batch, and their levels."""
        clean = clean_of(batch)
        level = self.times.draw(draws.uniform("time"), nets["teacher"].form)
        level = Level(level.alpha.to(clean), level.sigma.to(clean))
        return level, level.noised(clean, draws.normal("noise", clean.shape[1:]).to(clean))

    def asked(self, student: Any, scale: Tensor) -> Callable[[Tensor, Level, Condition], Tensor]:
        """Return the student at a scale. Raises ValueError where it would have to know the scale and cannot."""
        if student.takes_guidance:
            return lambda noised, level, condition: student(noised, level, condition, guidance=scale)
        if self.scales[0] < self.scales[1]:
            raise ValueError(
                "student: it takes no guidance scale, and method.scales has several: set student.guided: true, or "
                "give one scale twice"
            )
        return student

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the loss on noised samples, and at each measured scale how far the student is from the guided teacher
        on the teacher's own paths, beside how far the teacher without guidance is."""
        still, condition = Step(0, step.total, step.epoch, step.seed), required(condition_of(batch))
        draws, readings = draws_of(batch, still), {}
        for w in self.measured:
            scale = torch.full_like(draws.uniform("scale"), w)
            states = self.path(nets["teacher"], draws, condition, scale)
            asked = self.asked(nets[self.exported], scale)
            pairs = [guidance_residual(asked, nets["teacher"], state, condition) for state in states]
            error, offset = (torch.stack(values).mean(0).sum() for values in zip(*pairs, strict=True))
            readings |= {f"error_w{w:g}": (error, "samples"), f"offset_w{w:g}": (offset, "samples")}
        return Terms(self.losses(nets, batch, frozenset({"student"}), still).terms, readings)

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means, and the residual at each scale: 1 is a student without guidance, 0 is exact."""
        return means | {f"residual_w{w:g}": means[f"error_w{w:g}"] / means[f"offset_w{w:g}"] for w in self.measured}

    def sampler(self) -> "GuidedInput":
        return GuidedInput(self.solver, self.guidance)


def guidance_residual(
    student: Callable[[Tensor, Level, Condition], Tensor], teacher: Any, state: dict[str, Tensor], condition: Condition
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Return the mean squares, for each sample, of student - guided teacher and of plain teacher - guided teacher.

    The ratio of their sums is the share of the guidance that is missing. `state` is one of a path: `noised`, `alpha`,
    `sigma`, and `clean`, what the guided teacher says there.
    """
    level = Level(state["alpha"], state["sigma"])
    with torch.no_grad():
        error = student(state["noised"], level, condition) - state["clean"]
        offset = teacher(state["noised"], level, condition) - state["clean"]
    return error.square().flatten(1).mean(1), offset.square().flatten(1).mean(1)


def required(condition: Condition | None) -> Condition:
    """Return a condition. Raises ValueError where there is none: guidance is the difference that one makes."""
    if condition is None:
        raise ValueError("data: rows say nothing of what a sample is of (labels, a prompt), and guidance needs it")
    return condition


@dataclass(frozen=True)
class GuidedInput:
    """How a student that takes the scale samples: along its flow, with one evaluation where guidance takes two.

    Attributes:
        solver: how the flow is followed.
        guidance: the scale w.
    """

    solver: Solver
    guidance: float

    @torch.no_grad()
    def __call__(self, denoiser: Any, draws: Draws, condition: Condition | None) -> Float[Tensor, "batch *shape"]:
        """Return a sample for each of `draws`, from the noise that the other samplers begin with."""
        noise = draws.normal("written 0", denoiser.shape)
        scale = noise.new_full((len(noise),), self.guidance) if denoiser.takes_guidance else None
        return self.solver(lambda x, level: denoiser(x, level, condition, guidance=scale), noise, denoiser.form)


class CFGDistillationSection(DiffusionOptions):
    """The guided teacher's two evaluations become one of the student, which takes the scale as an input."""

    method: ClassVar = GuidanceDistillation
    name: Literal["cfg_distillation"] = "cfg_distillation"
    scales: tuple[float, float] = (0.0, 2.0)
    """Least and greatest scale w of `c + w (c - 0)` (the usual scale minus 1) that the student learns."""
    states: Literal["data", "paths"] = "data"
    """Where student and teacher are compared: at noised samples, or along the paths of the guided teacher."""
    times: AnyTimes = LogNormal()
    """Noise levels of noised samples."""
    solver: Solver = Solver()
    """How the guided teacher's paths are followed, and the student is sampled."""
    paths: int | None = Field(None, ge=1)
    """Paths that the teacher makes before the first step; by default one for each training row."""
    weighting: Literal["truncated_snr", "uniform"] = "truncated_snr"
    """Weight of the squared error of x_0: max(1, SNR), or none. What guidance adds is greatest where there is much
    noise and the SNR is low."""
    guidance: float = 1.0
    """Scale with which samples in evaluation are drawn."""
    measured: list[float] = [0.5, 1.0, 2.0]
    """Scales at which evaluation compares the student with the guided teacher (`residual_w...`)."""
