"""rCM: consistency in continuous time, whose samples are pulled to the teacher's distribution as well."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import AnyTimes, LogNormal
from kdlm.methods.diffusion.continuous_consistency import ContinuousConsistency, ContinuousOptions
from kdlm.methods.diffusion.distribution_matching import DistributionMatching
from kdlm.methods.diffusion.method import clean_of, condition_of, draws_of
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.roles import Role


class ScoreRegularisedConsistency(ContinuousConsistency):
    """rCM (arXiv 2510.08431): sCM keeps the diversity, distribution matching the quality.

    The student is alone until the warm-up is over. Then it moves at every `ratio`-th step, by both losses, and at the
    others the fake network learns to denoise its samples. The paper's times of simulated steps are random; here they
    are `steps`.

    Args: as `ContinuousConsistency`, and
        matching: lambda, weight of distribution matching; terms are means over elements.
        ratio: steps of the run for each of the student.
        matching_times: noise levels at which the scores are compared, and the fake network trains.
        fake: what the fake network starts as a copy of.
        fake_learning_rate: of the fake network; None follows the run.
    """

    paper = "arXiv 2510.08431"

    def __init__(
        self,
        *,
        matching: float = 1.0,
        ratio: int = 5,
        matching_times: AnyTimes,
        fake: Literal["teacher", "student"] = "teacher",
        fake_learning_rate: float | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.ratio, self.matching_weight = ratio, matching
        self.needs = DistributionMatching.needs
        self.matching = DistributionMatching(
            steps=self.steps,
            times=matching_times,
            guidance=self.guidance,
            ratio=ratio,
            fake=fake,
            fake_learning_rate=fake_learning_rate,
        )

    @property
    def roles(self) -> dict[str, Role]:
        return {**super().roles, "fake": self.matching.roles["fake"]}

    @property
    def computes(self) -> tuple[str, ...]:
        return ("consistency", "matching", "fake", *super().computes)

    def active(self, step: int) -> frozenset[str]:
        after = step - self.warmup
        if after >= 0 and after % self.ratio:
            return frozenset({"fake"})
        return frozenset({"student", "log_variance"} if self.adaptive else {"student"})

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        draws, condition = draws_of(batch, step), condition_of(batch)
        terms = {}
        if "student" in active:
            values = self.consistency(nets, clean_of(batch), draws, condition, step)
            terms["consistency"] = Term(values.sum(), "samples")
        if step.index < self.warmup:
            return Terms(terms)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "student" in active):
            samples = self.matching.written(nets["student"], draws, condition)
        if "student" in active:
            pull, _ = self.matching.pulled(nets, samples, draws, condition)
            terms["matching"] = Term(pull.sum(), "samples", self.matching_weight)
            terms |= self.beside(nets, samples, batch, step)
        if "fake" in active:
            denoising = self.matching.denoising(nets, samples.detach(), draws, condition)
            terms["fake"] = Term(denoising.sum(), "samples")
        return Terms(terms)

    def blend(self, time: Float[Tensor, "batch"], share: float) -> Float[Tensor, "batch"]:
        """Return rCM's weight: `-cos t sqrt(1 - r^2 sin^2 t) (s F^- - dx/dt)` less what `r cos t df/dt` has of it."""
        cosine = time.cos()
        return cosine * (1 - (share * time.sin()).square()).sqrt() - share * cosine.square()


class RCMSection(ContinuousOptions):
    """Continuous-time consistency with distribution matching on the student's samples."""

    method: ClassVar = ScoreRegularisedConsistency
    name: Literal["rcm"] = "rcm"
    times: AnyTimes = LogNormal(mean=-0.8, std=1.6)
    """Noise levels at which consistency is trained."""
    warmup: int = Field(1000, ge=0)
    """Optimiser steps over which the student's own derivative comes in; distribution matching starts after them."""
    matching: float = Field(1.0, ge=0)
    """Weight of distribution matching beside consistency: more of it is quality, less is diversity."""
    matching_times: AnyTimes = LogNormal(mean=0.0, std=1.6)
    """Noise levels at which teacher and fake network are compared."""
    ratio: int = Field(5, ge=2)
    """After the warm-up: steps of the run for each of the student; the others are the fake network's."""
    fake: Literal["teacher", "student"] = "teacher"
    """What the fake network starts as a copy of."""
    fake_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the fake network; by default the run's."""
