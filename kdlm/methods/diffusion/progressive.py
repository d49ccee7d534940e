"""Progressive distillation: two steps of the teacher become one of the student, and again, until few are left."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import AnyGrid, Condition, Draws, Karras, Level, follow, grid_levels, guided, moved, over
from kdlm.methods.diffusion.method import DiffusionMethod, DiffusionOptions, clean_of, condition_of, draws_of
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.roles import Role, SnapshotOf


class Progressive(DiffusionMethod):
    """Two DDIM steps of the teacher against one of the student (progressive distillation, arXiv 2202.00512).

    The run has phases. In the first the teacher has `start` steps and the student learns half of them; when a phase
    ends, a copy of the student (of its average, where there is one) is the teacher of the next. All phases use levels
    of one grid, the coarser every second one of the finer, so that none is rounded.

    Args:
        start: steps of the teacher.
        end: steps of the finished student; `start` is `end` times a power of two.
        phase_steps: optimiser steps of a phase; the last goes on to the end of the run.
        grid: the levels, quantiles of a distribution; a clean sample lies behind the last.
        guidance: w of the first teacher's guidance, `c + w (c - 0)`, which the student then has without asking.
        weighting: of squared errors of x_0: `truncated_snr` is max(1, SNR), `snr_plus_one` is SNR + 1.
        **options: as `DiffusionMethod`.
    """

    paper = "arXiv 2202.00512"

    def __init__(
        self,
        *,
        start: int,
        end: int,
        phase_steps: int,
        grid: AnyGrid | None = None,
        guidance: float = 0.0,
        weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr",
        **options: Any,
    ):
        super().__init__(**options)
        self.start, self.end, self.phase_steps = start, end, phase_steps
        self.grid, self.guidance, self.weighting = grid or Karras(), guidance, weighting
        self.phases = (start // end).bit_length() - 1
        if self.phases < 1 or end << self.phases != start:
            raise ValueError(f"method.start: {start} must be {end} (method.end) times a power of two, 2 or more")

    @property
    def computes(self) -> tuple[str, ...]:
        return ("step", *super().computes)

    @property
    def roles(self) -> dict[str, Role]:
        return {**super().roles, "previous": SnapshotOf(self.exported, at=self.begins)}

    def begins(self, done: int) -> bool:
        """Say whether a phase, but not the first, begins after this many optimiser steps."""
        return done > 0 and done % self.phase_steps == 0 and done // self.phase_steps < self.phases

    def phase(self, done: int) -> int:
        """Return the number of the phase after this many optimiser steps, from 0."""
        return min(done // self.phase_steps, self.phases - 1)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        if step.total < (needed := self.phases * self.phase_steps):
            raise ValueError(
                f"training.max_steps: {self.phases} phases of method.phase_steps={self.phase_steps} take {needed} "
                f"steps, and the run has {step.total}"
            )
        return self.compared(nets, batch, draws_of(batch, step), self.phase(step.index))

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the loss of the phase that the run is in, with the same noise at every call."""
        still = Step(0, step.total, step.epoch, step.seed)
        return self.compared(nets, batch, draws_of(batch, still), self.phase(step.index))

    def compared(self, nets: Nets, batch: Batch, draws: Draws, phase: int) -> Terms:
        """Return the loss of one phase."""
        clean, condition = clean_of(batch), condition_of(batch)
        at, half, to = self.interval(nets["student"], clean, draws, phase)
        noised = at.noised(clean, draws.normal("noise", clean.shape[1:]).to(clean))

        def teacher(noised: Tensor, level: Level) -> Tensor:
            if phase:
                return nets["previous"](noised, level, condition)
            return guided(nets["teacher"], noised, level, condition, self.guidance)

        with torch.no_grad():
            target = two_steps(teacher, noised, at, half, to)
        error = (nets["student"](noised, at, condition) - target).square().flatten(1).mean(1)
        weight = at.snr.clamp(min=1) if self.weighting == "truncated_snr" else at.snr + 1
        return Terms({"step": Term((weight * error).sum(), "samples")})

    def interval(self, student: Any, like: Tensor, draws: Draws, phase: int) -> tuple[Level, Level, Level]:
        """Return a student's step for each sample: where it begins, the teacher's step in its middle, and its end."""
        grid = grid_levels(self.grid, self.start, student.form, like)
        ones = torch.ones_like(grid[0].alpha)
        alphas = torch.stack([*(level.alpha for level in grid), ones])
        sigmas = torch.stack([*(level.sigma for level in grid), torch.zeros_like(ones)])
        half = 1 << phase
        first = 2 * half * draws.integer("step", self.start // (2 * half))
        rows = torch.arange(len(like), device=like.device)
        at, middle, end = (Level(alphas[first + n, rows], sigmas[first + n, rows]) for n in (0, half, 2 * half))
        return at, middle, end

    def sampler(self) -> "GridSteps":
        return GridSteps(self.end, self.start // self.end, self.grid)


def two_steps(
    teacher: Callable[[Tensor, Level], Tensor], noised: Float[Tensor, "batch *shape"], at: Level, half: Level, to: Level
) -> Float[Tensor, "batch *shape"]:
    """Return the x_0 with which one DDIM step from `at` lands where two of the teacher do, by way of `half`.

    The paper's form, `(x_b - (s_b / s_t) x_t) / (a_b - (s_b / s_t) a_t)` (arXiv 2202.00512, appendix G), is a
    difference of large numbers. With ratios r of noise to signal it is the mean of the teacher's two predictions with
    weights `r_b / r_m - r_b / r_t` and `1 - r_b / r_m` over their sum, which is `1 - r_b / r_t`.
    """
    early = teacher(noised, at)
    late = teacher(moved(noised, early, at, half), half)
    whole, second = to.ratio / at.ratio, to.ratio / half.ratio
    return over((second - whole) / (1 - whole), early) * early + over((1 - second) / (1 - whole), late) * late


@dataclass(frozen=True)
class GridSteps:
    """How a progressively distilled student samples: DDIM steps on every `stride`-th level of its first grid."""

    steps: int
    stride: int
    grid: AnyGrid

    @torch.no_grad()
    def __call__(self, denoiser: Any, draws: Draws, condition: Condition | None) -> Float[Tensor, "batch *shape"]:
        """Return a sample for each of `draws`, from the noise that the other samplers begin with."""
        noise = draws.normal("written 0", denoiser.shape)
        levels = grid_levels(self.grid, self.steps * self.stride, denoiser.form, noise)[:: self.stride]
        predict = partial(denoiser, condition=condition)
        return follow(predict, over(levels[0].scale, noise) * noise, levels, second_order=False)


class ProgressiveSection(DiffusionOptions):
    """Two steps of the teacher become one of the student, phase by phase."""

    method: ClassVar = Progressive
    name: Literal["progressive"] = "progressive"
    start: int = Field(32, ge=2)
    """Steps of the teacher; halved in every phase."""
    end: int = Field(1, ge=1)
    """Steps of the finished student."""
    phase_steps: int = Field(ge=1)
    """Optimiser steps of a phase. To begin the learning rate anew in each: `lr_scheduler_type: cosine_with_restarts`
    with as many cycles."""
    grid: AnyGrid = Karras()
    """The levels of the teacher's steps."""
    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1."""
    weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"
    """Weight of the squared error of x_0: max(1, SNR) or SNR + 1."""
