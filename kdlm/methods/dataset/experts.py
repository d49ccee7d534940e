"""Experts: networks trained on the real images, of which a synthetic set learns the way they took."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from kdlm.methods.dataset.augmentation import Augmentation
from kdlm.methods.dataset.networks import Vectors
from kdlm.section import Section

TINY = 1e-12


class Experts(Section):
    """How experts train: by plain SGD, whose steps a few on a synthetic set can imitate."""

    count: int = Field(20, ge=1)
    """Experts; their ways are kept in memory and in the run folder."""
    batch_size: int = Field(128, ge=1)
    """Real images a step."""
    learning_rate: float = Field(0.05, gt=0)
    """Of SGD, without momentum."""
    rho: float = Field(0.0, ge=0)
    """Radius within which the loss is to be flat (adaptive SAM); 0 is SGD."""
    alpha: float = Field(0.0, ge=0)
    """Strength of GSAM's step against the surrogate gap, with `rho`."""

    def trained(
        self,
        networks: Vectors,
        images: Float[Tensor, "n channels height width"],
        labels: Int[Tensor, "n"],
        epochs: int,
        augmentation: Augmentation,
        seed: int,
    ) -> Float[Tensor, "experts epochs_and_one size"]:
        """Return the weights of every expert as it began, and after each of its epochs.

        Args:
            networks: their architecture.
            images, labels: the real ones.
            epochs: how long they train.
            augmentation: of every batch.
            seed: of their first weights and their batches.
        """
        seeds = [seed + number for number in range(self.count)]
        weights = torch.stack([networks.fresh(each, images.device) for each in seeds])
        direction = vmap(flat_direction(networks, self.rho, self.alpha))
        taken = [weights]
        for epoch in range(epochs):
            # each expert goes through the images in an order of its own: [experts, images]
            orders = torch.stack([order(len(labels), each, epoch) for each in seeds])
            for number, chosen in enumerate(orders.split(self.batch_size, dim=1)):
                seen = augmentation(images[chosen.flatten()], seed + epoch * 100_003 + number)
                batch = seen.unflatten(0, chosen.shape)
                weights = weights - self.learning_rate * direction(weights, batch, labels[chosen])
            taken.append(weights)
        return torch.stack(taken, dim=1)


def order(count: int, expert: int, epoch: int) -> Int[Tensor, "count"]:
    """Return the order in which an expert goes through the images in one of its epochs."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(expert * 100_003 + epoch))


def flat_direction(networks: Vectors, rho: float, alpha: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function (weights, images, labels) -> what a step goes against.

    The gradient g; with `rho` that at `w + rho w^2 g / |w g|` (adaptive SAM, arXiv 2102.11600), on the same batch;
    with `alpha` also less `alpha` times the part of g that is perpendicular to it (GSAM, arXiv 2203.08065).
    """
    slope = grad(lambda w, images, labels: cross_entropy(networks.logits(w, images), labels))

    def direction(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        here = slope(weights, images, labels)
        if not rho:
            return here
        step = rho * weights.square() * here / ((weights * here).norm() + TINY)
        there = slope(weights + step, images, labels)
        across = here - (here @ there) / (there @ there + TINY) * there
        return there - alpha * across

    return direction
