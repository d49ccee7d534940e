"""Distribution matching with a discriminator: DMD2, f-distill, and LADD, which has nothing else."""

from typing import ClassVar, Literal

from pydantic import Field

from kdlm.methods.diffusion.density_ratio import DensityRatio, FDivergence
from kdlm.methods.diffusion.discriminator import Discriminator
from kdlm.methods.diffusion.distribution_matching import FakeOptions, MatchingOptions
from kdlm.methods.diffusion.pull import NormalisedDifference


class DMD2Section(FakeOptions):
    """DMD and a discriminator that has seen data, by default on the fake network's own features."""

    paper: ClassVar = "arXiv 2405.14867"
    parts: ClassVar = {"pull": NormalisedDifference}
    name: Literal["dmd2"] = "dmd2"
    discriminator: Discriminator
    """The GAN beside the pull."""


class FDistillSection(FakeOptions):
    """DMD2 with each sample's pull weighed by what the discriminator thinks of it: any f-divergence."""

    paper: ClassVar = "arXiv 2502.15681"
    parts: ClassVar = {"pull": NormalisedDifference, "density_ratio": DensityRatio}
    name: Literal["f_distill"] = "f_distill"
    discriminator: Discriminator
    """The GAN beside the pull, whose logit is the logarithm of the ratio of the two laws."""
    divergence: FDivergence = "forward_kl"
    """Which f-divergence. `neyman` blows up while the student is broader than the teacher."""
    bins: int = Field(10, ge=1)
    """Of noise levels; the ratio's mean is taken in each of them."""
    decay: float = Field(0.9, ge=0, lt=1)
    """Of the running means, per step of the student."""


class TeacherDiscriminator(Discriminator):
    """Heads on middle features of the frozen teacher."""

    of: Literal["teacher"] = "teacher"
    """Whose features they are."""
    weight: float = Field(1.0, gt=0)
    """Of the student's loss to it."""
    own_weight: float = Field(1.0, gt=0)
    """Of its own loss."""


class LADDSection(MatchingOptions):
    """A discriminator on the frozen teacher's features, and nothing else: latent adversarial diffusion distillation."""

    paper: ClassVar = "arXiv 2403.12015"
    name: Literal["ladd"] = "ladd"
    discriminator: TeacherDiscriminator
    """What the student's noised samples have to pass."""
    ratio: int = Field(1, ge=1)
    """Steps of the discriminator for each of the student."""
    cadence: Literal["inclusive", "exclusive"] = "inclusive"
    """Whether the discriminator moves in the student's steps too."""
