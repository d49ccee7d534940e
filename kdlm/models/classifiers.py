"""Classifier: reads an image classifier's logits, and the outputs of its modules by their paths."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from kdlm.features import recorded


def is_image_classifier(module: nn.Module) -> bool:
    """Whether a network names classes: a transformers model for image classification, one of timm's, or `num_classes`.

    Any other network becomes one by an attribute `num_classes` and a forward from images to logits.
    """
    return type(module).__name__.endswith("ForImageClassification") or isinstance(
        getattr(module, "num_classes", None), int
    )


class Classifier:
    """Asks an image classifier for its logits.

    Args:
        module: called with images; returns logits, or an output with `logits` (transformers).
    """

    provides = frozenset({"teacher.classes", "teacher.features"})

    def __init__(self, module: Any):
        self.module = module

    @property
    def num_classes(self) -> int:
        """Classes it tells apart."""
        own = getattr(self.module, "num_classes", None)
        return own if own is not None else self.module.config.num_labels

    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits, in the graph of the module's parameters and of the images."""
        return self.with_features(images, ())[0]

    def with_features(
        self, images: Float[Tensor, "batch channels height width"], paths: Sequence[str]
    ) -> tuple[Float[Tensor, "batch classes"], dict[str, Any]]:
        """Return the logits and what the modules at `paths` returned (of a tuple the first part).

        Raises ValueError for a path that is no module, with the nearest ones that are.
        """
        with recorded(self.module, paths) as features:
            output = self.module(images)
        return getattr(output, "logits", output), features
