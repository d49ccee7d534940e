"""Discrete consistency models: one function takes every point of a path to the path's clean end.

What it says at a level is held against what it says one step nearer to the data. The step is the teacher's
(consistency distillation), or goes along the straight line to the batch's own sample (consistency training).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import Boundary, Condition, Draws, FewSteps, Level, guided, rewound, stepped
from kdlm.methods.diffusion.level_pairs import AnyPairs, KarrasGrid
from kdlm.methods.diffusion.method import DiffusionMethod, DiffusionOptions, clean_of, condition_of, draws_of
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.roles import EmaOf, Role

Solver = Literal["euler", "heun", "none"]
"""How the teacher takes a step; `none`: there is no teacher, the step keeps the sample and its noise."""


class Consistency(DiffusionMethod):
    """Consistency distillation and training (arXiv 2303.01469), with ECT's schedule (arXiv 2406.14548) as a choice.

    The consistency function is what the denoiser predicts, f(x_t, t) = x_0. The two evaluations that are compared
    drop the same units.

    Args:
        steps: times at which it samples, of its own form and falling; one or a few.
        pairs: the two levels that are compared.
        solver: of the teacher's step.
        guidance: w of the teacher's guidance in its step, `c + w (c - 0)`; the student then has it built in.
        target: decay of the average of the student that is the far end of the comparison; None is the student itself,
            without a gradient.
        huber: c of the pseudo-Huber distance `sqrt(m + c^2) - c`, m the mean square over a sample; None is m.
        weight: `inverse_gap` divides by the distance of the two levels in the student's time, which keeps the
            gradient of a distance that is linear from vanishing with it.
        boundary: how f(x, t_min) = x is kept where the network's own form does not; see `Boundary`.
        **options: as `DiffusionMethod`.
    """

    paper = "arXiv 2303.01469"

    def __init__(
        self,
        *,
        steps: Sequence[float],
        pairs: AnyPairs,
        solver: Solver = "heun",
        guidance: float = 0.0,
        target: float | None = None,
        huber: float | None = 5.4e-4,
        weight: Literal["inverse_gap", "uniform"] = "inverse_gap",
        boundary: Boundary | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.steps, self.pairs, self.solver, self.guidance = tuple(steps), pairs, solver, guidance
        self.target, self.huber, self.weight, self.boundary = target, huber, weight, boundary
        if solver == "none":
            self.needs = frozenset({"samples"})

    @property
    def roles(self) -> dict[str, Role]:
        average: dict[str, Role] = {} if self.target is None else {"target": EmaOf("student", self.target)}
        return {**super().roles, **average}

    def sampler(self) -> FewSteps:
        return FewSteps(self.steps, boundary=self.boundary)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        draws, condition, clean = draws_of(batch, step), condition_of(batch), clean_of(batch)
        student = nets["student"]
        at, to = self.pairs.draw(draws.uniform("time"), student.form, step.progress)
        noise = draws.normal("noise", clean.shape[1:])
        noised, scale = at.noised(clean, noise), self.scale(draws)
        with torch.no_grad():
            if self.solver == "none":
                nearer = to.noised(clean, noise)
            else:
                nearer = self.teachers_step(nets["teacher"], noised, at, to, condition, scale)
            with rewound(noised):
                wanted = self.consistent(self.far_end(nets), nearer, to, condition, scale)
        error = self.consistent(student, noised, at, condition, scale) - wanted
        values = self.distance(error)
        if self.weight == "inverse_gap":
            values = values / (student.form.time(at) - student.form.time(to))
        return Terms({"consistency": Term(values.sum(), "samples")})

    def scale(self, draws: Draws) -> float | Float[Tensor, "batch"]:
        """Return w of the teacher's guidance: one for all, or one for each sample, which the student is then told."""
        return self.guidance

    def teachers_step(
        self, teacher: Any, noised: Tensor, at: Level, to: Level, condition: Condition | None, scale: float | Tensor
    ) -> Tensor:
        """Return the point one step of the guided teacher nearer to the data."""
        predict = partial(guided, teacher, condition=condition, scale=scale)
        return stepped(predict, noised, at, to, second_order=self.solver == "heun")

    def far_end(self, nets: Nets) -> Any:
        """Return the network that gives the target; an average drops units where the student does."""
        if self.target is None:
            return nets["student"]
        return nets["target"].train(nets["student"].training)

    def consistent(
        self, network: Any, noised: Tensor, level: Level, condition: Condition | None, scale: float | Tensor
    ) -> Tensor:
        """Return where the consistency function carries `x_t`: to its clean end."""
        told = scale if isinstance(scale, Tensor) else None
        clean = network(noised, level, condition, guidance=told)
        return clean if self.boundary is None else self.boundary(network, noised, level, clean)

    def distance(self, error: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch"]:
        """Return how far two predictions lie apart."""
        square = error.float().square().flatten(1).mean(1)
        return square if self.huber is None else (square + self.huber**2).sqrt() - self.huber


class LatentConsistency(Consistency):
    """LCM (arXiv 2310.04378): consistency distillation under guidance whose scale the student takes as an input.

    Args: as `Consistency`, but
        guidance: least and greatest w; where they differ one is drawn for each sample, and the student must take it
            (`student.guided`).
        sampled_guidance: w that samples are asked with.
        huber: c of the Huber distance of each element, `sqrt(d^2 + c^2) - c`; None is d^2.
    """

    paper = "arXiv 2310.04378"

    def __init__(self, *, guidance: tuple[float, float], sampled_guidance: float, **options: Any):
        super().__init__(**options)
        self.low, self.high = guidance
        self.sampled_guidance = sampled_guidance
        if not self.low <= sampled_guidance <= self.high:
            raise ValueError(
                f"method.sampled_guidance: {sampled_guidance:g} is not in the range {self.low:g} to {self.high:g} "
                "of method.guidance that the student learns"
            )

    def sampler(self) -> FewSteps:
        told = self.sampled_guidance if self.low < self.high else None
        return FewSteps(self.steps, guidance=told, boundary=self.boundary)

    def scale(self, draws: Draws) -> float | Float[Tensor, "batch"]:
        return self.low if self.low == self.high else self.low + (self.high - self.low) * draws.uniform("guidance")

    def distance(self, error: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch"]:
        square = error.float().square()
        element = square if self.huber is None else (square + self.huber**2).sqrt() - self.huber
        return element.flatten(1).mean(1)


class ConsistencyOptions(DiffusionOptions):
    """What can be asked of any discrete consistency model."""

    steps: list[float] = Field(min_length=1)
    """Times at which the student predicts a clean sample, falling, in its own form: EDM's sigma, a step of the table,
    flow matching's t."""
    pairs: AnyPairs = KarrasGrid()
    """The two noise levels that are compared."""
    solver: Solver = "heun"
    """The teacher's step from one to the other; `none` needs no teacher (consistency training)."""
    weight: Literal["inverse_gap", "uniform"] = "inverse_gap"
    """Whether the distance is divided by that of the two levels, in the student's own time."""
    boundary: Boundary | None = None
    """For networks that predict noise or velocity: how the function is made to return its input at the least noise."""


class ConsistencySection(ConsistencyOptions):
    """A student that takes any point of the teacher's path to its clean end in one step."""

    method: ClassVar = Consistency
    name: Literal["consistency"] = "consistency"
    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1."""
    target: float | None = Field(None, gt=0, lt=1)
    """Decay of the average that gives the target; by default the student gives it, without a gradient."""
    huber: float | None = Field(5.4e-4, gt=0)
    """c of the pseudo-Huber distance of whole samples; null is the squared error."""


class LatentConsistencySection(ConsistencyOptions):
    """A student of the guided teacher that takes the guidance scale as an input."""

    method: ClassVar = LatentConsistency
    name: Literal["lcm"] = "lcm"
    solver: Literal["euler", "heun"] = "euler"
    """The teacher's step from one level to the other: Euler's is DDIM's."""
    guidance: tuple[float, float] = (5.0, 15.0)
    """Least and greatest scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1. Where they differ
    the student needs `guided: true`."""
    sampled_guidance: float
    """Scale that the student samples with."""
    target: float | None = Field(0.95, gt=0, lt=1)
    """Decay of the average that gives the target; null: the student gives it, without a gradient."""
    huber: float | None = Field(1e-3, gt=0)
    """c of the Huber distance of each element; null is the squared error."""
    weight: Literal["inverse_gap", "uniform"] = "uniform"
    """Whether the distance is divided by that of the two levels, in the student's own time."""
