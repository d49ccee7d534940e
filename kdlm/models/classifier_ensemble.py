"""Several image classifiers as one, and whether classifiers and data know the same classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlm.models.classifiers import Classifier


class ClassifierEnsemble(nn.Module):
    """Several image classifiers as one, whose softmax is the mean of theirs; its modules are at `members.0...`.

    Raises ValueError when they do not tell the same number of classes apart.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)
        counts = [Classifier(member).num_classes for member in members]
        if len(set(counts)) > 1:
            raise ValueError(f"members of an ensemble must know the same classes, they have {counts}")
        self.num_classes = counts[0]

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logarithm of the mean of the members' probabilities."""
        each = torch.stack([Classifier(member)(images).float().log_softmax(-1) for member in self.members])
        return each.logsumexp(0) - torch.tensor(float(len(each))).log()


def check_classes(networks: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Raise ValueError when a `Classifier` tells apart another number of classes than the data have names."""
    for name, network in networks.items():
        if isinstance(network, Classifier) and network.num_classes != len(classes):
            raise ValueError(
                f"{name}: it tells {network.num_classes} classes apart, and the data have {len(classes)}: "
                "set num_labels (of a student with a fresh head), or take other data"
            )
