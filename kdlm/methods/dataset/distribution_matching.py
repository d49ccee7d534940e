"""Dataset distillation by matching distributions in the features of networks that never train."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.methods.dataset.method import DatasetMethod, DatasetOptions, networks_for, seed_of, synthetic_of
from kdlm.methods.method import Batch, Nets, Step, Term, Terms


class FeatureMeanMatching(DatasetMethod):
    """Mean features of each class, of real and of synthetic images, in a fresh random network at every step.

    DM (Zhao and Bilen 2023, arXiv 2110.04181): `sum_c |mean f(A(x_real,c)) - mean f(A(x_synthetic,c))|^2`, summed over
    features, with the same draw of A for both. Classes weigh by their share of the batch.
    """

    paper = "arXiv 2110.04181"
    computes = ("matching",)

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        synthetic = synthetic_of(nets)
        if synthetic.soft_labels is not None or synthetic.log_learning_rate is not None:
            raise ValueError("student: dm learns images alone: leave out soft_labels and learning_rate")
        networks = networks_for(self.network, synthetic)
        vector = networks.fresh(seed_of(step, "network"), synthetic.pixel_values.device)
        draw = seed_of(step, "augmentation")
        with torch.no_grad():
            real = networks.features(vector, self.augmentation(batch["pixel_values"], draw))
        ours = networks.features(vector, self.augmentation(synthetic.pixel_values, draw))
        distance = mean_distance(real, batch["labels"], ours, synthetic.labels)
        return Terms({"matching": Term(distance, "images")})


def mean_distance(
    real: Float[Tensor, "n width"],
    real_labels: Int[Tensor, "n"],
    synthetic: Float[Tensor, "m width"],
    synthetic_labels: Int[Tensor, "m"],
) -> Float[Tensor, ""]:
    """Return `sum_c n_c |mean_c real - mean_c synthetic|^2`, with n_c real images of class c; others are left out.

    Its gradient to the synthetic features, `2 n_c (mean_c synthetic - mean_c real)`, is a sum over real images, so
    a step's does not depend on how its batch is split; its value does, by a variance within classes.
    """
    classes = int(synthetic_labels.max()) + 1
    theirs, count = _means(real, real_labels, classes)
    ours, own = _means(synthetic, synthetic_labels, classes)
    return (count * (own > 0) * (theirs - ours).square().sum(-1)).sum()


def _means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each class, zero where it has no row, and how many rows it has."""
    member = (labels[None] == torch.arange(classes, device=labels.device)[:, None]).to(features.dtype)
    count = member.sum(-1)
    return member @ features / count.clamp(min=1)[:, None], count


class DMSection(DatasetOptions):
    """Mean features of each class in fresh random networks."""

    method: ClassVar = FeatureMeanMatching
    name: Literal["dm"] = "dm"
