"""Classifier: reads an image classifier's logits, and the outputs of its modules by their paths."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlm.features import recorded
from kdlm.models.modes import evaluating


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

    @torch.no_grad()
    def probed(self, paths: Sequence[str]) -> dict[str, Any]:
        """Return what the modules at `paths` return for one blank image: their widths, before any data are seen.

        Raises ValueError for a path that is no module, with the nearest ones that are.
        """
        parameter = next(self.module.parameters())
        blank = torch.zeros(1, *image_shape(self.module), dtype=parameter.dtype, device=parameter.device)
        with evaluating(self.module):
            return self.with_features(blank, paths)[1]


def image_shape(module: Any) -> tuple[int, int, int]:
    """Return the channels, height and width of the images that a network takes.

    From its attribute `image_shape`, or as transformers and timm say it; 224 x 224 where a transformers model takes any
    size. Raises ValueError where nothing says it.
    """
    if (own := getattr(module, "image_shape", None)) is not None:
        return tuple(own)
    if (timm := getattr(module, "default_cfg", None)) is not None:
        return tuple(timm["input_size"])
    config = getattr(module, "config", None)
    if (channels := getattr(config, "num_channels", None)) is None:
        raise ValueError(f"{type(module).__name__}: give it an attribute `image_shape` (channels, height, width)")
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return channels, height, width
