"""Terms beside any method that writes samples: distances between the written set and the data of the batch.

Unlike a method's own terms they belong to whole sets. Cut into micro-batches or ranks, their mean is still an unbiased
estimate, of more variance: give them the largest micro-batch that there is room for.
"""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdlm.diffusion import Condition, Draws, Level
from kdlm.losses import RBFMixture, mmd2, polynomial
from kdlm.methods.method import Nets
from kdlm.section import Section


class MMD(Section):
    """Maximum mean discrepancy between samples and data, as they are or in the teacher's features (arXiv 2301.07969).

    A metric on the features that were trained on says less than one on others.
    """

    name: Literal["mmd"] = "mmd"
    weight: float = Field(1.0, gt=0)
    """Of the squared discrepancy."""
    kernel: Literal["polynomial", "rbf"] = "polynomial"
    """`polynomial` is of degree 3, KID's; `rbf` a mixture of Gaussian ones."""
    bandwidths: list[float] = [0.1, 0.3, 1.0, 3.0]
    """Of `rbf`, for samples as they are in their own units."""
    layers: list[str] = []
    """Modules of the teacher whose outputs are compared; by default the samples are, flattened."""
    noise: float = Field(0.1, gt=0)
    """Ratio of noise to signal at which the teacher is told that the samples are; no noise is added."""

    @model_validator(mode="after")
    def _bandwidths(self) -> "MMD":
        RBFMixture(self.bandwidths)
        return self

    def __call__(
        self,
        nets: Nets,
        written: Float[Tensor, "batch *shape"],
        data: Float[Tensor, "batch *shape"],
        draws: Draws,
        condition: Condition | None,
    ) -> Float[Tensor, ""]:
        """Return the distance between two sets; its gradient flows into the first."""
        kernel = polynomial if self.kernel == "polynomial" else RBFMixture(self.bandwidths)
        ours, theirs = (self._read(nets, samples, condition) for samples in (written, data))
        return mmd2(ours, theirs, kernel)

    def _read(self, nets: Nets, samples: Tensor, condition: Condition | None) -> Float[Tensor, "batch width"]:
        if not self.layers:
            return samples.flatten(1)
        ones = torch.ones(len(samples), device=samples.device)
        _, features = nets["teacher"].with_features(samples, Level(ones, self.noise * ones), condition, self.layers)
        return torch.cat([features[layer].flatten(1) for layer in self.layers], 1)


class EmbeddingLoss(Section):
    """Means of samples and data in the features of networks that are drawn anew at every step (arXiv 2604.22379).

    The kernel, the networks and the weight are this project's: the paper's were not at hand. Means alone, as in
    dataset distillation by distribution matching, over enough networks see more than the first moment.
    """

    name: Literal["embedding"] = "embedding"
    weight: float = Field(1.0, gt=0)
    """Of the squared distance of the means, a mean over features."""
    networks: int = Field(4, ge=1)
    """Drawn in a step; the same for all ranks and micro-batches."""
    width: int = Field(128, ge=1)
    """Of their two hidden layers."""

    def __call__(
        self,
        nets: Nets,
        written: Float[Tensor, "batch *shape"],
        data: Float[Tensor, "batch *shape"],
        draws: Draws,
        condition: Condition | None,
    ) -> Float[Tensor, ""]:
        """Return the distance between two sets; its gradient flows into the first."""
        parts = []
        for number in range(self.networks):
            seed = int(draws.shared(f"embedding {number}") * 2**62)
            ours, theirs = (_embedded(samples.flatten(1), self.width, seed) for samples in (written, data))
            parts.append(mmd2(ours, theirs, lambda a, b: a @ b.T / a.shape[1]))
        return torch.stack(parts).mean()


def _embedded(samples: Float[Tensor, "batch width"], width: int, seed: int) -> Float[Tensor, "batch features"]:
    """Return what a random network with two hidden layers makes of samples."""
    generator = torch.Generator().manual_seed(seed)
    for outputs in (width, width):
        inputs = samples.shape[1]
        weight = torch.randn(outputs, inputs, generator=generator) * math.sqrt(2 / inputs)
        bias = torch.randn(outputs, generator=generator)
        samples = nn.functional.silu(samples @ weight.T.to(samples) + bias.to(samples))
    return samples


AnyBeside = Annotated[MMD | EmbeddingLoss, Field(discriminator="name")]
"""A term beside a method's own."""
