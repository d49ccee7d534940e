"""Reflow: straight paths between the noise and the sample that a teacher's flow joins, then one step along them.

Everything here is in flow matching's form, `x_t = (1 - t) x + t z` with the velocity `z - x`, whatever the networks'
own: asked for x_0 at that level, a denoiser D has the velocity `(x_t - D) / t`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.data import TensorRows
from kdlm.diffusion import Condition, Draws, FlowMatching, Level, Solver, guided, over
from kdlm.methods.diffusion.method import (
    CONDITIONS,
    DiffusionMethod,
    DiffusionOptions,
    condition_of,
    draws_of,
)
from kdlm.methods.method import Batch, Nets, Preparation, Step, Term, Terms

PREPARATION = -2
"""The step that the noise of pairs is drawn of: no step of the run."""
LEAST = 1e-3
"""The least t: below it a velocity is a difference of two equal numbers."""
FLOW = FlowMatching()
Distance = Literal["l2", "pseudo_huber"]


class Reflow(DiffusionMethod):
    """Regression on pairs of noise and sample that the teacher's flow joins (rectified flow, arXiv 2209.03003).

    The pairs are made once, before the first step. `straight` regresses the velocity along the line between the two
    ends of a pair, at uniform t; paths straighten, and samples take few steps. `one_step` regresses the sample on the
    noise: of pairs of a reflowed teacher it is InstaFlow's distillation (arXiv 2309.06380, there with a perceptual
    distance), of any other's the plain regression that reflow is compared with.

    Args:
        pairs: how many; None: one for each training row. Conditions are those of the training rows, in turn.
        solver: how the teacher's flow is followed.
        guidance: w of the teacher's guidance, `c + w (c - 0)`, which the student then has without asking.
        target: `straight` or `one_step`.
        distance: `l2`, or `pseudo_huber`, which far outliers pull at with a constant force.
        steps: of the student's samples, equally far apart in t.
        **options: as `DiffusionMethod`.
    """

    paper = "arXiv 2209.03003"

    def __init__(
        self,
        *,
        pairs: int | None = None,
        solver: Solver | None = None,
        guidance: float = 0.0,
        target: Literal["straight", "one_step"] = "straight",
        distance: Distance = "l2",
        steps: int = 1,
        **options: Any,
    ):
        super().__init__(**options)
        self.pairs, self.solver, self.guidance = pairs, solver or Solver(), guidance
        self.target, self.steps = target, steps
        self.distance: Distance = distance

    @property
    def computes(self) -> tuple[str, ...]:
        return ("pairs", *super().computes)

    def prepare(self, context: Preparation) -> TensorRows:
        """Return the pairs: `noise`, `samples`, `index`, and the conditions that the training rows have."""
        total = self.pairs or len(context.rows)
        made = []
        for first in range(0, total, context.batch_size):
            numbers = range(first, min(total, first + context.batch_size))
            rows = context.batch(number % len(context.rows) for number in numbers)
            draws = Draws(torch.tensor(list(numbers), device=context.device), context.seed, PREPARATION)
            noise, samples = self.pair(context.nets, draws, condition_of(rows))
            kept = {key: rows[key] for key in CONDITIONS if key in rows}
            made.append({"noise": noise, "samples": samples, "index": draws.index, **kept})
        return TensorRows({key: torch.cat([part[key].cpu() for part in made]) for key in made[0]})

    @torch.no_grad()
    def pair(self, nets: Nets, draws: Draws, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """Return noise and the sample that the teacher's flow leads it to."""
        teacher = nets["teacher"]
        noise = draws.normal("written 0", teacher.shape)
        predict = partial(guided, teacher, condition=condition, scale=self.guidance)
        return noise, self.solver(predict, noise, teacher.form)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        draws = draws_of(batch, step)
        error = self.error(nets["student"], batch["noise"], batch["samples"], draws, condition_of(batch))
        return Terms({"pairs": Term(distance(error, self.distance).sum(), "samples")})

    def error(self, student: Any, noise: Tensor, samples: Tensor, draws: Draws, condition: Condition | None) -> Tensor:
        """Return how far the student's velocity, or its sample, is from that of the pairs."""
        first, last = times_of(student, noise)
        if self.target == "one_step":
            level = FLOW.level(last.expand(len(noise)))
            return student(over(level.scale, noise) * noise, level, condition) - samples
        time = first + draws.uniform("time").to(noise) * (last - first)
        noised = FLOW.level(time).noised(samples, noise)
        return velocity(student, noised, time, condition) - (noise - samples)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the loss on new pairs of the evaluation rows' conditions, and how straight both flows are, where paths
        are learnt."""
        still, condition = Step(0, step.total, step.epoch, step.seed), condition_of(batch)
        noise, samples = self.pair(nets, draws_of(batch, still), condition)
        terms = self.losses(nets, {**batch, "noise": noise, "samples": samples}, frozenset({"student"}), still)
        if self.target == "one_step":
            return terms

        def free(noised: Tensor, level: Level) -> Tensor:
            return guided(nets["teacher"], noised, level, condition, self.guidance)

        student = nets[self.exported]
        ours = straightness(student, noise, condition, self.solver.steps)
        theirs = straightness(nets["teacher"], noise, condition, self.solver.steps, free)
        readings = {"straightness": (ours.sum(), "samples"), "teacher_straightness": (theirs.sum(), "samples")}
        return Terms(terms.terms, readings)

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means, and how much of the teacher's curvature is left."""
        if "straightness" not in means:
            return means
        return means | {"straightness_ratio": means["straightness"] / max(means["teacher_straightness"], 1e-30)}

    def sampler(self) -> "StraightSteps":
        return StraightSteps(self.steps)


@dataclass(frozen=True)
class StraightSteps:
    """How a reflowed student samples: Euler's steps, equally far apart in flow matching's t."""

    steps: int = 1

    @torch.no_grad()
    def __call__(self, denoiser: Any, draws: Draws, condition: Condition | None) -> Float[Tensor, "batch *shape"]:
        """Return a sample for each of `draws`, from the noise that the other samplers begin with."""
        noise = draws.normal("written 0", denoiser.shape)
        predict = partial(denoiser, condition=condition)
        *_, (noised, time, velocity) = walk(denoiser, noise, predict, self.steps)
        return noised - over(time, noised) * velocity


def walk(denoiser: Any, noise: Tensor, predict: Any, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `x_t`, t and the velocity at each of `steps` Euler steps from noise towards a sample.

    The last is not taken: it ends at `x_t - t v`, the sample.
    """
    last = times_of(denoiser, noise)[1].expand(len(noise))
    times = [last * (steps - number) / steps for number in range(steps)]
    noised = over(FLOW.level(last).scale, noise) * noise
    for at, to in pairwise([*times, torch.zeros_like(last)]):
        speed = (noised - predict(noised, FLOW.level(at))) / over(at, noised)
        yield noised, at, speed
        noised = noised + over(to - at, noised) * speed


@torch.no_grad()
def straightness(
    denoiser: Any, noise: Tensor, condition: Condition | None, steps: int, predict: Any = None
) -> Float[Tensor, "batch"]:
    """Return `S = int |v_t - (z - x)|^2 dt` along the flow's own paths, mean over elements; 0 where they are lines.

    The integral is over `steps` Euler steps, equally far apart in t (arXiv 2209.03003, section 2.2).
    """
    asked = predict or (lambda noised, level: denoiser(noised, level, condition))
    speeds = torch.stack([speed for _, _, speed in walk(denoiser, noise, asked, steps)])
    return (speeds - speeds.mean(0)).square().flatten(2).mean((0, 2))  # their mean is the way over its time


def velocity(denoiser: Any, noised: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
    """Return a denoiser's velocity `dx_t / dt` in flow matching's form."""
    return (noised - denoiser(noised, FLOW.level(time), condition)) / over(time, noised)


def times_of(denoiser: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest t that a denoiser's own form reaches."""
    ends = torch.tensor([denoiser.form.first, denoiser.form.last], device=like.device)
    first, last = FLOW.time(denoiser.form.level(ends)).to(like.dtype)
    return first.clamp(min=LEAST), last


def distance(error: Tensor, kind: Distance) -> Float[Tensor, "batch"]:
    """Return each sample's distance, mean over elements.

    The pseudo-Huber distance is `sqrt(|e|^2 + c^2) - c` with `c = 0.00054 sqrt(d)` for d elements (arXiv 2310.14189,
    section 3.3), here over sqrt(d), so that it does not grow with d.
    """
    square = error.square().flatten(1).mean(1)
    return square if kind == "l2" else (square + 0.00054**2).sqrt() - 0.00054


class ReflowSection(DiffusionOptions):
    """Velocities along straight lines between the teacher's noise and samples, or its samples in one step."""

    method: ClassVar = Reflow
    name: Literal["reflow"] = "reflow"
    pairs: int | None = Field(None, ge=1)
    """Pairs of noise and sample that the teacher makes before the first step; by default one for each training row."""
    solver: Solver = Solver()
    """How the teacher's flow is followed to make them."""
    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1."""
    target: Literal["straight", "one_step"] = "straight"
    """`straight`: the velocity along the line between the ends of a pair. `one_step`: the sample, of the noise alone:
    InstaFlow's last stage, where the teacher is a reflowed student."""
    distance: Distance = "l2"
    """Mean square, or the pseudo-Huber distance."""
    steps: int = Field(1, ge=1)
    """Steps in which the student is sampled."""
