"""Pull: what is made of the two predictions at a student's noised sample, as a value whose gradient moves the sample.

A new weighting or divergence of the family is a `Pull` here or in a file of its own; networks, noise and turns are
`DistributionMatching`'s.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.diffusion import Level, over


@dataclass(frozen=True)
class Compared:
    """A student's sample after noise was added, and what the two networks take it for.

    Attributes:
        samples: x, in the student's graph.
        level: of the noise.
        noised: x_t; in the graph where the pull is `live`, like the two predictions.
        real: the teacher's prediction of x.
        fake: the prediction of the network that learns the student's law; x itself where there is none.
    """

    samples: Float[Tensor, "batch *shape"]
    level: Level
    noised: Float[Tensor, "batch *shape"]
    real: Float[Tensor, "batch *shape"]
    fake: Float[Tensor, "batch *shape"]


class Pull:
    """Base of all pulls.

    Attributes:
        live: whether gradients flow through both networks to their inputs; their parameters are held either way.
            Without it x alone is in the graph.
        has_fake: whether a network learns the student's law. Without one its law is the single point x.
    """

    live: ClassVar[bool] = False
    has_fake: ClassVar[bool] = True

    def __call__(self, seen: Compared) -> Float[Tensor, "batch"]:
        """Return a value for each sample, a mean over its elements."""
        raise NotImplementedError


def along(samples: Float[Tensor, "batch *shape"], direction: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch"]:
    """Return a value whose gradient to the samples is `direction`, over the number of elements."""
    return 0.5 * mean_of((samples - (samples - direction).detach()).square())


def mean_of(values: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch"]:
    """Return the mean over each sample's elements."""
    return values.flatten(1).mean(1)


@torch.no_grad()
def teacher_error(seen: Compared) -> Float[Tensor, "batch"]:
    """Return DMD's divisor (arXiv 2311.18828, eq. 8): the teacher's mean error. Far from the data the steps are short.

    No graph.
    """
    return mean_of((seen.samples - seen.real).abs()).clamp(min=1e-8)


@dataclass(frozen=True)
class NormalisedDifference(Pull):
    """`(y_fake - y_teacher) / mean |x - y_teacher|` (DMD, arXiv 2311.18828, eq. 7 and 8)."""

    def __call__(self, seen: Compared) -> Float[Tensor, "batch"]:
        return along(seen.samples, (seen.fake - seen.real) / over(teacher_error(seen), seen.real))


DMD = NormalisedDifference()
