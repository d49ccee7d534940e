"""Reverse KL between the student's samples and the teacher at every noise level: DMD, and before it VSD and SDS."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.diffusion import over
from kdlm.methods.diffusion.distribution_matching import FakeOptions, GuidedOptions
from kdlm.methods.diffusion.pull import Compared, NormalisedDifference, Pull, along


@dataclass(frozen=True)
class NoiseDifference(Pull):
    """`w (e_teacher - e_fake)` of the predicted noises, which is `w (y_fake - y_teacher) alpha / sigma`.

    VSD (ProlificDreamer, arXiv 2305.16213; SwiftBrush, arXiv 2312.05239).

    Attributes:
        weight: w: `constant` 1, or `variance`, the sigma^2 of the variance-preserving path.
    """

    weight: Literal["constant", "variance"] = "constant"

    def __call__(self, seen: Compared) -> Float[Tensor, "batch"]:
        ratio = seen.level.ratio
        factor = 1 / ratio if self.weight == "constant" else ratio / (1 + ratio.square())
        return along(seen.samples, over(factor, seen.real) * (seen.fake - seen.real))


@dataclass(frozen=True)
class PointDifference(NoiseDifference):
    """VSD's where the student's law is the single point x: SDS (DreamFusion, arXiv 2209.14988), `w (e_teacher - e)`."""

    has_fake: ClassVar[bool] = False


class DMDSection(FakeOptions):
    """Reverse KL at every noise level between the student's samples and the teacher, by the teacher's own error."""

    paper: ClassVar = "arXiv 2311.18828"
    parts: ClassVar = {"pull": NormalisedDifference}
    name: Literal["dmd"] = "dmd"


class VSDSection(FakeOptions):
    """Reverse KL at every noise level by the difference of the two predicted noises: variational score distillation."""

    paper: ClassVar = "arXiv 2305.16213"
    parts: ClassVar = {"pull": NoiseDifference}
    name: Literal["vsd"] = "vsd"
    ratio: int = Field(1, ge=1)
    """Steps of the fake network for each of the student."""
    weight: Literal["constant", "variance"] = "constant"
    """What multiplies the difference of the noises: 1, or sigma^2 of the variance-preserving path."""


class SDSSection(GuidedOptions):
    """The teacher's predicted noise against the added one: score distillation sampling, which seeks modes."""

    paper: ClassVar = "arXiv 2209.14988"
    parts: ClassVar = {"pull": PointDifference}
    name: Literal["sds"] = "sds"
    weight: Literal["constant", "variance"] = "constant"
    """What multiplies the difference of the noises: 1, or sigma^2 of the variance-preserving path."""
