"""How good a set of images is: what networks know of held-out images once they have trained on the set alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy

from kdlm.methods.dataset.augmentation import Augmentation
from kdlm.methods.dataset.networks import MLP, AnyNetwork, ConvNet, Vectors
from kdlm.section import Section


class Evaluation(Section):
    """Training of fresh networks on a set: the same for every set that is compared."""

    networks: int = Field(3, ge=1)
    """Networks that train on the set, each from weights of its own; figures are their mean."""
    second: AnyNetwork | None = None
    """Another architecture to train on the set too, whose accuracy is `second_accuracy`."""
    steps: int = Field(300, ge=1)
    """Steps of SGD."""
    batch_size: int = Field(128, ge=1)
    """Images a step; a smaller set is taken whole."""
    learning_rate: float = Field(0.05, gt=0)
    """Of SGD. The one that a set has learned is not used, so that sets are compared alike."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    seed: int = 0
    """Of the networks' weights and batches."""

    def trained(
        self,
        architecture: MLP | ConvNet,
        images: Float[Tensor, "n channels height width"],
        targets: Tensor,
        classes: int,
        augmentation: Augmentation,
    ) -> Float[Tensor, "networks size"]:
        """Return networks that trained on a set. No random state but their own is touched.

        Args:
            architecture: of the networks.
            images, targets: the set; targets are classes or probabilities.
            classes: to tell apart.
            augmentation: of every batch.
        """
        networks = Vectors(architecture, tuple(images.shape[1:]), classes)
        weights = torch.stack([networks.fresh(self.seed + number, images.device) for number in range(self.networks)])
        velocity = torch.zeros_like(weights)
        images, targets = images.detach(), targets.detach()
        chance = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            chosen = torch.arange(len(images))
            if len(images) > self.batch_size:
                chosen = torch.randint(len(images), (self.batch_size,), generator=chance)
            batch = augmentation(images[chosen], self.seed + step)
            with torch.enable_grad():
                logits = answers(networks, weights.requires_grad_(), batch)
                each = vmap(cross_entropy, in_dims=(0, None))(logits, targets[chosen])
                (slope,) = torch.autograd.grad(each.sum(), weights)
            velocity = self.momentum * velocity + slope
            weights = weights.detach() - self.learning_rate * velocity
        return weights


def answers(
    networks: Vectors, weights: Float[Tensor, "networks size"], images: Float[Tensor, "n channels height width"]
) -> Float[Tensor, "networks n classes"]:
    """Return the logits of several networks of one architecture."""
    return vmap(networks.logits, in_dims=(0, None))(weights, images)


def accuracies(
    sets: Sequence[tuple[Tensor, Tensor]],
    held_out: tuple[Tensor, Tensor],
    architecture: MLP | ConvNet,
    evaluation: Evaluation,
    augmentation: Augmentation,
) -> Float[Tensor, "sets networks"]:
    """Return the accuracy on held-out images of every network that trained on every set.

    Args:
        sets: (images, targets) of each: a synthetic one, or what to compare it with, see `random_sets`, `class_means`.
        held_out: images and their classes.
        architecture: of the networks.
        evaluation, augmentation: how they train.
    """
    images, labels = held_out
    classes = int(labels.max()) + 1
    networks = Vectors(architecture, tuple(images.shape[1:]), classes)
    found = []
    for shown, targets in sets:
        weights = evaluation.trained(architecture, shown, targets, classes, augmentation)
        found.append((answers(networks, weights, images).argmax(-1) == labels).float().mean(-1))
    return torch.stack(found)


def random_sets(images: Tensor, labels: Tensor, per_class: int, draws: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Return sets of `per_class` real images of each class, drawn anew for each: what a synthetic set has to beat."""
    sets = []
    for draw in range(draws):
        chance = torch.Generator().manual_seed(draw)
        order = torch.randperm(len(labels), generator=chance)
        members = [order[labels[order] == label][:per_class] for label in range(int(labels.max()) + 1)]
        chosen = torch.cat(members)
        sets.append((images[chosen], labels[chosen]))
    return sets


def class_means(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean image of every class: at one image per class no learning at all, and hard to beat."""
    shown = torch.arange(int(labels.max()) + 1)
    return torch.stack([images[labels == label].mean(0) for label in shown]), shown
