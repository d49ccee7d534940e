"""Continuous-time consistency models: the step between the two levels of a discrete one, made infinitely small."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdlm.diffusion import (
    AnyTimes,
    Condition,
    Differentiation,
    Draws,
    FewSteps,
    LogNormal,
    TrigFlow,
    derivative,
    guided,
    over,
    rewound,
)
from kdlm.methods.diffusion.method import DiffusionMethod, DiffusionOptions, clean_of, condition_of, draws_of
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.roles import Role, Trainable


class ContinuousConsistency(DiffusionMethod):
    """sCM (arXiv 2410.11081): along the teacher's path the student's prediction of x_0 must not change.

    In TrigFlow, `x_t = cos t x_0 + sin t z` with z of the data's standard deviation s, the paper writes the student as
    `f = cos t x_t - sin t s F`. Here f is what any denoiser predicts, so that F = (cos t x_t - f) / (s sin t), and the
    paper's tangent is `g = cos t df/dt` once the warm-up is over. The loss moves F against itself by g:
    `|F - F^- - g|^2`, F^- the student itself without a gradient; there is no average for a target.

    Args:
        steps: times at which it samples, of its own form and falling.
        source: of dx/dt: the `teacher` (sCD), or the `data`'s own sample and noise (sCT), which needs no teacher.
        times: distribution of the noise level.
        sigma_data: s.
        guidance: w of the teacher's guidance, `c + w (c - 0)`.
        warmup: optimiser steps over which df/dt comes in; before, the student is held to dx/dt alone.
        weight: on top of the loss, whose g has the paper's weight in it: `uniform`, or `inverse_ratio`, 1 / (s tan t),
            as released code for large models has it. With `adaptive` the two come to much the same.
        adaptive: whether a learned log-variance of t weighs the levels.
        differentiation: how df/dt is taken.
        **options: as `DiffusionMethod`.
    """

    paper = "arXiv 2410.11081"
    NORM = 0.1

    def __init__(
        self,
        *,
        steps: Sequence[float],
        source: Literal["teacher", "data"] = "teacher",
        times: AnyTimes,
        sigma_data: float = 0.5,
        guidance: float = 0.0,
        warmup: int = 10_000,
        weight: Literal["uniform", "inverse_ratio"] = "uniform",
        adaptive: bool = True,
        differentiation: Differentiation = "forward",
        **options: Any,
    ):
        super().__init__(**options)
        self.steps, self.source, self.times, self.path = tuple(steps), source, times, TrigFlow(sigma_data)
        self.guidance, self.warmup, self.weight, self.adaptive = guidance, warmup, weight, adaptive
        self.differentiation: Differentiation = differentiation
        if source == "data":
            self.needs = frozenset({"samples"})

    @property
    def roles(self) -> dict[str, Role]:
        weight: dict[str, Role] = {"log_variance": Trainable(lambda student, teacher: LogVariance())}
        return {**super().roles, **(weight if self.adaptive else {})}

    def sampler(self) -> FewSteps:
        return FewSteps(self.steps)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        values = self.consistency(nets, clean_of(batch), draws_of(batch, step), condition_of(batch), step)
        return Terms({"consistency": Term(values.sum(), "samples")})

    def consistency(
        self, nets: Nets, clean: Tensor, draws: Draws, condition: Condition | None, step: Step
    ) -> Float[Tensor, "batch"]:
        """Return a value for each sample whose gradient moves F by the tangent."""
        student = nets["student"]
        noised, time, velocity = self.point(nets, clean, draws, condition)
        level = self.path.level(time)
        with rewound(noised):
            rate = self.rate(student, noised, time, velocity, condition)
        found = student(noised, level, condition)
        tangent = self.normalised(self.tangent(found.detach(), rate, noised, time, velocity, self.warmth(step)))
        moved = (found - found.detach()) / over(self.path.sigma_data * time.sin(), noised)  # -(F - F^-)
        values = (moved + tangent).square().flatten(1).mean(1)
        if self.weight == "inverse_ratio":
            values = values / level.ratio
        if self.adaptive:
            log_variance = nets["log_variance"](time)
            values = values * (-log_variance).exp() + log_variance
        return values

    @torch.no_grad()
    def point(
        self, nets: Nets, clean: Tensor, draws: Draws, condition: Condition | None
    ) -> tuple[Tensor, Float[Tensor, "batch"], Tensor]:
        """Return a point of a path for each sample: `x_t`, its TrigFlow time and dx/dt."""
        time = self.path.time(self.times.draw(draws.uniform("time"), nets["student"].form))
        level, noise = self.path.level(time), draws.normal("noise", clean.shape[1:])
        noised = level.noised(clean, noise)
        if self.source == "data":
            velocity = over(time.cos() * self.path.sigma_data, noised) * noise - over(time.sin(), noised) * clean
        else:
            velocity = self.slope(guided(nets["teacher"], noised, level, condition, self.guidance), noised, time)
        return noised, time, velocity

    def warmth(self, step: Step) -> float:
        """Return the share of df/dt that is in: 0 at first, 1 after the warm-up."""
        return min(1.0, step.index / self.warmup) if self.warmup else 1.0

    def slope(self, clean: Tensor, noised: Tensor, time: Float[Tensor, "batch"]) -> Tensor:
        """Return `s F`, which is dx/dt of whoever predicts `clean` at `x_t`."""
        return (over(time.cos(), noised) * noised - clean) / over(time.sin(), noised)

    def rate(self, student: Any, noised: Tensor, time: Tensor, velocity: Tensor, condition: Condition | None) -> Tensor:
        """Return `cos t df/dt`; the cosine is inside the tangents of the derivative, where it keeps them bounded."""
        predict = lambda x, t: student(x, self.path.level(t), condition)  # noqa: E731
        return derivative(predict, noised, time, velocity, factor=time.cos(), how=self.differentiation)

    def tangent(
        self, clean: Tensor, rate: Tensor, noised: Tensor, time: Float[Tensor, "batch"], velocity: Tensor, share: float
    ) -> Float[Tensor, "batch *shape"]:
        """Return the paper's g: `-cos^2 t (s F^- - dx/dt) - r (cos t sin t x_t + cos t sin t s dF^-/dt)`.

        Since `cos t df/dt` is that at r = 1, it is `r cos t df/dt + (1 - r) cos^2 t (dx/dt - s F^-)`.
        """
        apart = velocity - self.slope(clean, noised, time)
        return share * rate + over(self.blend(time, share), noised) * apart

    def blend(self, time: Float[Tensor, "batch"], share: float) -> Float[Tensor, "batch"]:
        """Return the weight of the difference of slopes while df/dt is not fully in."""
        return (1 - share) * time.cos().square()

    def normalised(self, tangent: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return `g / (|g| + 0.1)`, |g| the root of the mean square, so that it does not depend on a sample's size."""
        size = tangent.square().flatten(1).mean(1).sqrt()
        return tangent / over(size + self.NORM, tangent)


class LogVariance(nn.Module):
    """Logarithm of the loss at a time, learned (EDM2, arXiv 2312.02696, eq. 21); 0 at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1.0, 9.0), persistent=False)
        self.leave = nn.Linear(17, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, time: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        phase = time[:, None] * self.get_buffer("frequencies")
        return self.leave(torch.cat([time[:, None], phase.sin(), phase.cos()], -1)).squeeze(-1)


class ContinuousOptions(DiffusionOptions):
    """What can be asked of any continuous-time consistency model."""

    steps: list[float] = Field(min_length=1)
    """Times at which the student predicts a clean sample, falling, in its own form: EDM's sigma, a step of the table,
    flow matching's t."""
    source: Literal["teacher", "data"] = "teacher"
    """What gives the direction of the path: the teacher (sCD), or the data, without a teacher (sCT)."""
    times: AnyTimes = LogNormal(mean=-1.0, std=1.4)
    """Noise levels that are trained at."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data."""
    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1."""
    weight: Literal["uniform", "inverse_ratio"] = "uniform"
    """Whether the loss is divided by the ratio of noise to signal."""
    adaptive: bool = True
    """Whether a learned log-variance of the time weighs the levels."""
    differentiation: Differentiation = "forward"
    """Forward mode, or a central difference in time for networks and wrappers that have none (FSDP, checkpointing)."""


class ContinuousConsistencySection(ContinuousOptions):
    """A student whose prediction does not change along the teacher's path, in continuous time."""

    method: ClassVar = ContinuousConsistency
    name: Literal["scm"] = "scm"
    warmup: int = Field(10_000, ge=0)
    """Optimiser steps over which the student's own derivative comes in."""
