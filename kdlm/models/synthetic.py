"""A set of images as the student: what dataset distillation learns."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from kdlm.section import Section

SURE = 0.9
"""What a learned label gives its class to begin with."""


class SyntheticImages(nn.Module):
    """Images to train networks on, as parameters.

    Its state is what `model.safetensors` of an exported set holds: `pixel_values`, `labels`, and, where they are
    learned, `soft_labels` (logits) and `log_learning_rate`. Values are those of the data (mostly [-1, 1]) and not
    clipped to it.

    Args:
        pixel_values: to begin with.
        labels: the class of each.
        soft_labels: logits of labels that are learned; None leaves the classes as they are.
        learning_rate: step size to begin with of a network that trains on the set, learned with it; None has none.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"student.images"})
    labels: Tensor
    start: Tensor

    def __init__(
        self,
        pixel_values: Float[Tensor, "n channels height width"],
        labels: Int[Tensor, "n"],
        *,
        soft_labels: Float[Tensor, "n classes"] | None = None,
        learning_rate: float | None = None,
    ):
        super().__init__()
        self.pixel_values = nn.Parameter(pixel_values.clone())
        self.register_buffer("labels", labels.clone())
        self.soft_labels = None if soft_labels is None else nn.Parameter(soft_labels.clone())
        start = None if learning_rate is None else torch.tensor(math.log(learning_rate))
        self.log_learning_rate = None if start is None else nn.Parameter(start)
        self.register_buffer("start", pixel_values.clone(), persistent=False)  # to be compared with

    @property
    def targets(self) -> Int[Tensor, "n"] | Float[Tensor, "n classes"]:
        """What a network is to answer: classes, or probabilities where labels are learned."""
        return self.labels if self.soft_labels is None else self.soft_labels.softmax(-1)

    @property
    def learning_rate(self) -> Float[Tensor, ""]:
        """The learned step size: positive, because its logarithm is the parameter."""
        if self.log_learning_rate is None:
            raise ValueError("student.learning_rate: this method learns one, so say what it begins with, e.g. 0.05")
        return self.log_learning_rate.exp()

    @property
    def num_classes(self) -> int:
        """Classes that the set tells apart."""
        return int(self.labels.max()) + 1 if self.soft_labels is None else self.soft_labels.shape[-1]


def load_synthetic(folder: str | Path) -> SyntheticImages:
    """Open an exported set. Raises ValueError when the folder holds none."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder}: no set of synthetic images (there is no {path.name})")
    kept = safetensors.torch.load_file(path)
    if missing := {"pixel_values", "labels"} - kept.keys():
        raise ValueError(f"{path}: no set of synthetic images: there are no {' and '.join(sorted(missing))}")
    rate = kept.get("log_learning_rate")
    student = SyntheticImages(
        kept["pixel_values"],
        kept["labels"],
        soft_labels=kept.get("soft_labels"),
        learning_rate=None if rate is None else math.exp(rate.item()),
    )
    student.load_state_dict(kept)
    return student


class SyntheticStudent(Section):
    """A small set of images, made of the training images to begin with."""

    name: Literal["synthetic_images"] = "synthetic_images"
    images_per_class: int = Field(1, ge=1)
    """Images of each class."""
    start: Literal["real", "class_means", "noise"] = "real"
    """What they are to begin with: images drawn from the training set; means, each of an equal share of its class;
    or standard normal noise."""
    soft_labels: bool = False
    """Learn the labels with the images, from 0.9 on the class, where the method can."""
    learning_rate: float | None = Field(None, gt=0)
    """Step size, to begin with, of a network that trains on the set; learned with the images where the method can."""

    def load_from(self, rows: Any, seed: int) -> SyntheticImages:
        """Return the set as it begins, of training rows with `pixel_values` and `labels`; unlabelled ones are left out.

        Raises ValueError when a class has fewer images than asked for.
        """
        labels = torch.tensor([int(rows[number]["labels"]) for number in range(len(rows))])
        chance = torch.Generator().manual_seed(seed)
        images, classes = [], int(labels.max()) + 1
        for label in range(classes):
            members = (labels == label).nonzero().flatten()
            if len(members) < self.images_per_class:
                raise ValueError(
                    f"student.images_per_class: {self.images_per_class} asked for, and the training data have "
                    f"{len(members)} of class {label}"
                )
            members = members[torch.randperm(len(members), generator=chance)]
            images.append(self._of_class(rows, members, chance))
        shown = torch.arange(classes).repeat_interleave(self.images_per_class)
        sure = math.log(SURE / (1 - SURE) * max(1, classes - 1))
        soft = nn.functional.one_hot(shown).float() * sure if self.soft_labels else None
        return SyntheticImages(torch.cat(images), shown, soft_labels=soft, learning_rate=self.learning_rate)

    def _of_class(self, rows: Any, members: Tensor, chance: torch.Generator) -> Tensor:
        """Return the images of one class; `members` are its rows in random order."""
        shares = members.tensor_split(self.images_per_class)
        if self.start == "class_means":
            return torch.stack([_images(rows, share).mean(0) for share in shares])
        real = _images(rows, members[: self.images_per_class])
        return real if self.start == "real" else torch.randn(real.shape, generator=chance)

    def describe(self) -> str:
        """Return the name a reader knows this student by."""
        return f"synthetic images, {self.images_per_class} per class, from {self.start.replace('_', ' ')}"


def _images(rows: Any, numbers: Tensor) -> Tensor:
    return torch.stack([rows[number]["pixel_values"] for number in numbers.tolist()]).float()
