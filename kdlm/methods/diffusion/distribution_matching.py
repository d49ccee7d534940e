"""Distribution matching: a few-step student whose samples follow the difference of two scores.

The student writes samples, noise is added to them, and the frozen teacher and a `fake` network that learns to denoise
the student's samples each predict the clean sample. Where they differ is where the student's law differs from the
teacher's. What is made of the difference is the `Pull`; a discriminator may be beside it, or in its place.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import AnyTimes, Condition, Draws, FewSteps, Karras, Level, edm_loss, guided
from kdlm.methods.diffusion.density_ratio import DensityRatio
from kdlm.methods.diffusion.discriminator import Discriminator
from kdlm.methods.diffusion.method import (
    DiffusionMethod,
    WritingOptions,
    clean_of,
    condition_of,
    draws_of,
    held,
    trainable_copy,
)
from kdlm.methods.diffusion.pull import DMD, Compared, Pull
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.roles import Role, Trainable


class DistributionMatching(DiffusionMethod):
    """Match the law of a student's samples to the teacher's at every noise level: DMD and its family.

    Args:
        pull: what moves the samples, by default DMD's; None leaves it to the discriminator.
        steps: times, of the student's own form and falling, at which it predicts a clean sample; one or a few.
        times: noise levels at which the scores are compared, and the fake network trains.
        guidance: w of classifier-free guidance of the teacher, `c + w (c - 0)`; the fake network has none.
        ratio: updates of the fake network and the discriminator for each of the student.
        cadence: `inclusive`: they move at every step, the student at every `ratio`-th;
            `exclusive`: at each step either they or the student.
        fake: what the fake network starts as a copy of.
        fake_learning_rate: its own; None follows the run.
        discriminator: a GAN beside the pull.
        density_ratio: weighs the pull of each sample by a function of the ratio of the two laws at it.
        **options: as `DiffusionMethod`.

    Raises ValueError when there is nothing to train the student on, or a ratio without a discriminator that knows it.
    """

    paper = "arXiv 2311.18828"

    def __init__(
        self,
        pull: Pull | None = DMD,
        *,
        steps: Sequence[float],
        times: AnyTimes,
        guidance: float = 0.0,
        ratio: int = 5,
        cadence: Literal["inclusive", "exclusive"] = "inclusive",
        fake: Literal["teacher", "student"] = "teacher",
        fake_learning_rate: float | None = None,
        discriminator: Discriminator | None = None,
        density_ratio: DensityRatio | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        if discriminator is None and (pull is None or density_ratio is not None):
            raise ValueError("a discriminator is missing: it stands in for a pull, and gives the ratio of laws")
        self.pull, self.discriminator, self.density_ratio = pull, discriminator, density_ratio
        self.steps, self.times, self.guidance = tuple(steps), times, guidance
        self.ratio, self.cadence = ratio, cadence
        self.fake, self.fake_learning_rate = fake, fake_learning_rate

    @property
    def critics(self) -> dict[str, Role]:
        """What learns the student's law beside it: the fake network, the discriminator, both or nothing."""
        roles: dict[str, Role] = {}
        if (self.pull is not None and self.pull.has_fake) or (self.discriminator and self.discriminator.of == "fake"):
            roles["fake"] = Trainable(
                lambda student, teacher: trainable_copy(student if self.fake == "student" else teacher),
                learning_rate=self.fake_learning_rate,
            )
        if (judge := self.discriminator) is not None:
            read_student = judge.of == "fake" and self.fake == "student"
            roles["discriminator"] = Trainable(
                lambda student, teacher: judge.heads(student if read_student else teacher),
                learning_rate=judge.learning_rate,
            )
        return roles

    @property
    def roles(self) -> dict[str, Role]:
        return {**super().roles, **self.critics}

    @property
    def computes(self) -> tuple[str, ...]:
        own = {"student": self.pull, "adversarial": self.discriminator}
        return (*(name for name, part in own.items() if part is not None), *self.critics, *super().computes)

    def active(self, step: int) -> frozenset[str]:
        critics = frozenset(self.critics)
        if not critics:
            return frozenset({"student"})
        if step % self.ratio:
            return critics
        return critics | {"student"} if self.cadence == "inclusive" or self.ratio == 1 else frozenset({"student"})

    def sampler(self) -> FewSteps:
        return FewSteps(self.steps)

    # One step

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        draws, condition = draws_of(batch, step), condition_of(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "student" in active):
            samples = self.written(nets["student"], draws, condition)
        terms, followed = {}, {}
        if "student" in active:
            if self.pull is not None:
                values, followed = self.pulled(nets, samples, draws, condition)
                terms["student"] = Term(values.sum(), "samples")
            if self.discriminator is not None:
                terms["adversarial"] = self.adversarial(nets, samples, draws, condition)
            terms |= self.beside(nets, samples, batch, step)
        if "fake" in active:
            terms["fake"] = Term(self.denoising(nets, samples.detach(), draws, condition).sum(), "samples")
        if "discriminator" in active and self.discriminator is not None:
            terms |= self.discriminating(nets, samples.detach(), clean_of(batch), draws, condition)
        return Terms(terms, followed=followed)

    def written(self, student: Any, draws: Draws, condition: Condition | None) -> Tensor:
        """Return samples of the student: of one of its steps, in whose graph they are; the steps before have none.

        The step is the same for all samples and ranks (backward simulation of DMD2, arXiv 2405.14867, section 4.4).
        """
        live = int(draws.shared("step") * len(self.steps))
        return self.sampler()(student, draws, condition, live=live)

    def pulled(
        self, nets: Nets, samples: Tensor, draws: Draws, condition: Condition | None
    ) -> tuple[Float[Tensor, "batch"], dict[str, tuple[Tensor, str]]]:
        """Return the pull on each sample, weighed by the ratio of laws if that is asked for, and what it follows."""
        assert self.pull is not None
        seen = self.compared(nets, samples, draws, condition)
        values = self.pull(seen)
        if self.density_ratio is None or self.discriminator is None:
            return values, {}
        with torch.no_grad():
            logit = self.discriminator.logit(nets, seen.noised, seen.level, condition)
        weight, followed = self.density_ratio(logit, draws.uniform("student time"))
        return weight * values, followed

    def compared(self, nets: Nets, samples: Tensor, draws: Draws, condition: Condition | None) -> Compared:
        """Add noise to the samples and ask both networks, with a graph to their inputs where the pull is live."""
        assert self.pull is not None
        fake = nets["fake"] if self.pull.has_fake else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.pull.live), _held(fake):
            level = self.level(nets, draws, "student")
            noised = level.noised(samples, draws.normal("student noise", samples.shape[1:]))
            real = guided(nets["teacher"], noised, level, condition, self.guidance)
            # Without a network the student's law is the sample itself, whose score is that of the noise added to it.
            taken_for = samples if fake is None else fake(noised, level, condition)
        return Compared(samples, level, noised, real, taken_for)

    def denoising(
        self, nets: Nets, samples: Tensor, draws: Draws, condition: Condition | None
    ) -> Float[Tensor, "batch"]:
        """Return the fake network's denoising error on the student's samples; guidance is not for it."""
        noise = draws.normal("fake noise", samples.shape[1:])
        return edm_loss(nets["fake"], samples, noise, self.level(nets, draws, "fake"), condition)

    def adversarial(self, nets: Nets, samples: Tensor, draws: Draws, condition: Condition | None) -> Term:
        """Return what the student loses to the discriminator at noised samples, through held networks."""
        judge = self.discriminator
        assert judge is not None
        level = self.level(nets, draws, "adversarial", judge.times)
        noised = level.noised(samples, draws.normal("adversarial noise", samples.shape[1:]))
        with held(nets["discriminator"]), _held(nets.get("fake")):
            return Term(judge.fooled(nets, noised, level, condition).sum(), "samples", judge.weight)

    def discriminating(
        self, nets: Nets, samples: Tensor, data: Tensor, draws: Draws, condition: Condition | None
    ) -> dict[str, Term]:
        """Return the discriminator's own loss on the student's samples and the data, noised to one level."""
        judge = self.discriminator
        assert judge is not None
        level, shape = self.level(nets, draws, "discriminator", judge.times), samples.shape[1:]
        written = level.noised(samples, draws.normal("discriminator noise", shape))
        real = level.noised(data.to(samples.dtype), draws.normal("data noise", shape))
        told = judge.told_apart(nets, written, real, level, condition)
        terms = {"discriminator": Term(told.sum(), "samples", judge.own_weight)}
        if judge.r1:
            noise = draws.normal("r1 noise", shape)
            steepness = judge.steepness(nets, real, noise, level, condition)
            terms["r1"] = Term(steepness.sum(), "samples", judge.own_weight * judge.r1)
        return terms

    def level(self, nets: Nets, draws: Draws, name: str, times: AnyTimes | None = None) -> Level:
        """Return a noise level for each sample."""
        return (times or self.times).draw(draws.uniform(f"{name} time"), nets["teacher"].form)

    # State

    @property
    def follows(self) -> tuple[str, ...]:
        return () if self.density_ratio is None else self.density_ratio.follows

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        if self.density_ratio is not None:
            self.density_ratio.stepped(means)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.density_ratio is None else self.density_ratio.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.density_ratio is not None:
            self.density_ratio.load_state_dict(state)


def _held(fake: Any) -> AbstractContextManager[None]:
    return nullcontext() if fake is None else held(fake)


class MatchingOptions(WritingOptions):
    """What every recipe of the family can say."""

    method: ClassVar = DistributionMatching
    steps: list[float] = Field(min_length=1)
    """Times at which the student predicts a clean sample, falling, in its own form: EDM's sigma, a step of the table,
    flow matching's t."""
    times: AnyTimes = Karras()
    """Noise levels at which the student's samples are looked at."""

    parts: ClassVar[dict[str, type]] = {}
    """Argument of the method -> the dataclass that is built for it from the fields of the same names."""

    def arguments(self) -> dict[str, Any]:
        given = {"pull": None, **super().arguments()}
        for name, part in self.parts.items():
            given[name] = part(**{field.name: given.pop(field.name) for field in fields(part) if field.init})
        return given


class GuidedOptions(MatchingOptions):
    """Of the methods that compare the student with the teacher's prediction."""

    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1."""


class FakeOptions(GuidedOptions):
    """Of the methods with a network that learns the student's law."""

    ratio: int = Field(5, ge=1)
    """Steps of the fake network for each of the student."""
    cadence: Literal["inclusive", "exclusive"] = "inclusive"
    """Whether the fake network moves in the student's steps too."""
    fake: Literal["teacher", "student"] = "teacher"
    """What the fake network starts as a copy of."""
    fake_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the fake network; by default the run's."""
