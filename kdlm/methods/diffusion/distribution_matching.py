"""Distribution matching: a few-step student whose samples follow the difference of two scores.

The student writes samples, noise is added to them, and the frozen teacher and a `fake` network that learns to denoise
the student's samples each predict the clean sample. Where they differ is where the student's law differs from the
teacher's. What is made of the difference is the `Pull`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import AnyTimes, Condition, Draws, FewSteps, Karras, Level, edm_loss, guided
from kdlm.methods.diffusion.method import (
    DiffusionMethod,
    DiffusionOptions,
    condition_of,
    draws_of,
    trainable_copy,
)
from kdlm.methods.method import Batch, Nets, Role, Step, Term, Terms, Trainable


class DistributionMatching(DiffusionMethod):
    """Reverse KL at every noise level between the student's samples and the teacher (DMD, arXiv 2311.18828).

    Without DMD's regression on pairs of the teacher, as DMD2 (arXiv 2405.14867) leaves it out.

    Args:
        steps: times, of the student's own form and falling, at which it predicts a clean sample; one or a few.
        times: noise levels at which the scores are compared, and the fake network trains.
        guidance: w of classifier-free guidance of the teacher, `c + w (c - 0)`; the fake network has none.
        ratio: updates of the fake network for each of the student.
        cadence: `inclusive`: the fake network moves at every step, the student at every `ratio`-th;
            `exclusive`: at each step one of the two.
        fake: what the fake network starts as a copy of.
        fake_learning_rate: its own; None follows the run.
    """

    paper = "arXiv 2311.18828"
    computes = ("student", "fake")

    def __init__(
        self,
        *,
        steps: Sequence[float],
        times: AnyTimes,
        guidance: float = 0.0,
        ratio: int = 5,
        cadence: Literal["inclusive", "exclusive"] = "inclusive",
        fake: Literal["teacher", "student"] = "teacher",
        fake_learning_rate: float | None = None,
        ema: float | None = None,
    ):
        super().__init__(ema=ema)
        self.steps, self.times, self.guidance = tuple(steps), times, guidance
        self.ratio, self.cadence = ratio, cadence
        self.fake, self.fake_learning_rate = fake, fake_learning_rate

    @property
    def roles(self) -> dict[str, Role]:
        def make(student: Any, teacher: Any) -> Any:
            return trainable_copy(student if self.fake == "student" else teacher)

        return {**super().roles, "fake": Trainable(make, learning_rate=self.fake_learning_rate)}

    def active(self, step: int) -> frozenset[str]:
        if step % self.ratio:
            return frozenset({"fake"})
        return frozenset({"student", "fake"} if self.cadence == "inclusive" or self.ratio == 1 else {"student"})

    def sampler(self) -> FewSteps:
        return FewSteps(self.steps)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        draws, condition = draws_of(batch, step), condition_of(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "student" in active):
            samples = self.written(nets["student"], draws, condition)
        terms = {}
        if "student" in active:
            terms["student"] = Term(self.pull(nets, samples, draws, condition).sum(), "samples")
        if "fake" in active:
            terms["fake"] = Term(self.denoising(nets, samples.detach(), draws, condition).sum(), "samples")
        return Terms(terms)

    def written(self, student: Any, draws: Draws, condition: Condition | None) -> Tensor:
        """Return samples of the student: of one of its steps, in whose graph they are; the steps before have none.

        The step is the same for all samples and ranks (backward simulation of DMD2, arXiv 2405.14867, section 4.4).
        """
        live = int(draws.shared("step") * len(self.steps))
        return self.sampler()(student, draws, condition, live=live)

    def pull(self, nets: Nets, samples: Tensor, draws: Draws, condition: Condition | None) -> Float[Tensor, "batch"]:
        """Return a value for each sample whose gradient to the samples is `(y_fake - y_teacher) / |x - y_teacher|`.

        The divisor is the mean over elements. No graph goes through either network.
        """
        with torch.no_grad():
            level = self.level(nets, draws, "student")
            noised = level.noised(samples, draws.normal("student noise", samples.shape[1:]))
            real = guided(nets["teacher"], noised, level, condition, self.guidance)
            difference = nets["fake"](noised, level, condition) - real
            size = (samples - real).abs().flatten(1).mean(1).clamp(min=1e-8)
            direction = difference / size.view(-1, *([1] * (samples.dim() - 1)))
        return 0.5 * (samples - (samples - direction).detach()).square().flatten(1).mean(1)

    def denoising(
        self, nets: Nets, samples: Tensor, draws: Draws, condition: Condition | None
    ) -> Float[Tensor, "batch"]:
        """Return the fake network's denoising error on the student's samples; guidance is not for it."""
        noise = draws.normal("fake noise", samples.shape[1:])
        return edm_loss(nets["fake"], samples, noise, self.level(nets, draws, "fake"), condition)

    def level(self, nets: Nets, draws: Draws, name: str) -> Level:
        """Return a noise level for each sample."""
        return self.times.draw(draws.uniform(f"{name} time"), nets["teacher"].form)


class DMDSection(DiffusionOptions):
    """Reverse KL at every noise level between the student's samples and the teacher."""

    method: ClassVar = DistributionMatching
    name: Literal["dmd"] = "dmd"
    steps: list[float] = Field(min_length=1)
    """Times at which the student predicts a clean sample, falling, in its own form: EDM's sigma, a step of the table,
    flow matching's t."""
    times: AnyTimes = Karras()
    """Noise levels at which the scores are compared."""
    guidance: float = Field(0.0, ge=0)
    """Scale w of the teacher's guidance, `c + w (c - 0)`: the usual scale minus 1."""
    ratio: int = Field(5, ge=1)
    """Steps of the fake network for each of the student."""
    cadence: Literal["inclusive", "exclusive"] = "inclusive"
    """Whether the fake network moves in the student's steps too."""
    fake: Literal["teacher", "student"] = "teacher"
    """What the fake network starts as a copy of."""
    fake_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the fake network; by default the run's."""
