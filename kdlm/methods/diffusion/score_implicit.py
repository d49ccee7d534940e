"""Distances between the two scores themselves, their gradients had without knowing the student's law: SIM, SiD.

For a sample x, its noised x_t and a function u of x_t, `E u (y_fake - x) = 0` if y_fake is the true posterior mean.
It is this identity, with all inputs live, that turns a loss on samples into the gradient of the distance. Detached, the
same losses are DMD, which gives good samples too: only gradients tell the two apart.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.methods.diffusion.distribution_matching import FakeOptions
from kdlm.methods.diffusion.pull import Compared, Pull, mean_of, teacher_error


def score_identity(
    samples: Float[Tensor, "batch *shape"],
    real: Float[Tensor, "batch *shape"],
    fake: Float[Tensor, "batch *shape"],
    alpha: float,
) -> Float[Tensor, "batch"]:
    """Return `(y_teacher - y_fake) ((y_teacher - x) - alpha (y_teacher - y_fake))`, mean over elements (SiD, eq. 23).

    With live inputs and held parameters its gradient is half that of `E |y_teacher - y_fake|^2`: at alpha = 1/2 the
    whole one, at alpha = 1 the one with the law that is averaged over held (SIM); above, the part through that law is
    taken off once more.
    """
    gap = real - fake
    return mean_of(gap * ((real - samples) - alpha * gap))


@dataclass(frozen=True)
class ScoreIdentity(Pull):
    """SiD (arXiv 2404.04057): `score_identity` over the teacher's error.

    Attributes:
        alpha: see `score_identity`.
    """

    live: ClassVar[bool] = True
    alpha: float = 1.2

    def __call__(self, seen: Compared) -> Float[Tensor, "batch"]:
        return score_identity(seen.samples, seen.real, seen.fake, self.alpha) / teacher_error(seen)


@dataclass(frozen=True)
class ScoreImplicit(Pull):
    """SIM (arXiv 2410.16794, eq. 3.7): the gradient of `E d(y_fake - y_teacher)`, the law that is averaged over held.

    The pseudo-Huber distance `sqrt(m + c^2) - c`, of the mean square m over elements, bounds its own gradient and is
    divided by nothing; the squared distance is SiD's with alpha = 1. That it is on clean predictions, and not on
    scores, is this project's choice of the weight over noise levels.

    Attributes:
        distance: `pseudo_huber` or `squared`.
        huber: c, in the units of the samples.
    """

    live: ClassVar[bool] = True
    distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    huber: float = 0.01

    def __call__(self, seen: Compared) -> Float[Tensor, "batch"]:
        if self.distance == "squared":
            return score_identity(seen.samples, seen.real, seen.fake, 1.0) / teacher_error(seen)
        gap = seen.real - seen.fake
        return mean_of(gap * (seen.fake - seen.samples)) / (mean_of(gap.square()) + self.huber**2).sqrt()


class SIMSection(FakeOptions):
    """A distance between the two scores at the student's samples: score implicit matching."""

    paper: ClassVar = "arXiv 2410.16794"
    parts: ClassVar = {"pull": ScoreImplicit}
    name: Literal["sim"] = "sim"
    ratio: int = Field(1, ge=1)
    """Steps of the fake network for each of the student."""
    distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    """Of the two predictions of the clean sample."""
    huber: float = Field(0.01, gt=0)
    """Where the pseudo-Huber distance turns from a square into a line, as a root mean square over elements."""


class SiDSection(FakeOptions):
    """The squared difference of the two scores, its gradient by score identities: score identity distillation."""

    paper: ClassVar = "arXiv 2404.04057"
    parts: ClassVar = {"pull": ScoreIdentity}
    name: Literal["sid"] = "sid"
    ratio: int = Field(1, ge=1)
    """Steps of the fake network for each of the student."""
    alpha: float = 1.2
    """0.5 is the whole gradient, 1 holds the law that is averaged over (SIM), above goes further that way."""
