"""A frozen network that is no language model as the teacher: an image classifier, a denoiser."""

from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import nn

from kdlm.models import (
    Classifier,
    ClassifierEnsemble,
    DenoiserSource,
    DualEncoder,
    DualEncoderSource,
    ImageClassifierSource,
    MaskedAutoencoder,
    MaskedAutoencoderSource,
    Predictor,
    TextClassifier,
    TextClassifierSource,
    view,
)
from kdlm.section import Section
from kdlm.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FrozenNetwork:
    """Lets methods call a network whose parameters are frozen; stays off the trainer's module tree.

    Whether a graph is kept is the method's choice, in one of three ways: under `torch.no_grad()` there is none;
    without it gradients flow through the teacher to live inputs, and never into its parameters; what is detached
    stops there.

    Args:
        module: put in eval mode and frozen here.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)
        self.view = view(self.module)
        """What methods call under the name `teacher`."""

    @property
    def provides(self) -> frozenset[str]:
        """What methods may need of it."""
        return getattr(self.view, "provides", frozenset())

    def to(self, device: torch.device) -> "FrozenNetwork":
        """Move the network."""
        self.module.to(device)
        return self


def freeze(model: nn.Module) -> LocalTeacher | FrozenNetwork:
    """Return the teacher that a model is."""
    if isinstance(view(model), Predictor):
        return LocalTeacher(cast("PreTrainedModel", model))
    return FrozenNetwork(model)


class _Frozen:
    """The part of a source's teacher that all have in common."""

    def build(self, device: torch.device) -> FrozenNetwork:
        """Load the model and freeze it; `device` is where the student trains."""
        return FrozenNetwork(self.load()).to(device)


class DenoiserTeacherSection(_Frozen, DenoiserSource):
    """A frozen diffusion or flow model."""

    provides: ClassVar[frozenset[str]] = frozenset({"teacher.denoiser"})
    """What a method may need of it, known without loading the weights."""


class ImageClassifierTeacherSection(_Frozen, ImageClassifierSource):
    """A frozen image classifier."""

    provides: ClassVar[frozenset[str]] = Classifier.provides
    """What a method may need of it, known without loading the weights."""


class TextClassifierTeacherSection(_Frozen, TextClassifierSource):
    """A frozen classifier of texts."""

    provides: ClassVar[frozenset[str]] = TextClassifier.provides
    """What a method may need of it, known without loading the weights."""


class DualEncoderTeacherSection(_Frozen, DualEncoderSource):
    """A frozen model that embeds images and texts."""

    provides: ClassVar[frozenset[str]] = DualEncoder.provides
    """What a method may need of it, known without loading the weights."""


class MaskedAutoencoderTeacherSection(_Frozen, MaskedAutoencoderSource):
    """A frozen masked autoencoder."""

    provides: ClassVar[frozenset[str]] = MaskedAutoencoder.provides
    """What a method may need of it, known without loading the weights."""


class ImageEnsembleSection(Section):
    """Several frozen image classifiers as one: the mean of their probabilities."""

    provides: ClassVar[frozenset[str]] = Classifier.provides
    """What a method may need of it."""

    name: Literal["image_ensemble"] = "image_ensemble"
    members: list[ImageClassifierSource] = Field(min_length=1)
    """The classifiers, all of the same classes."""

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        return f"ensemble of {', '.join(member.describe() for member in self.members)}"

    def build(self, device: torch.device) -> FrozenNetwork:
        """Load every member and freeze it; `device` is where the student trains."""
        return FrozenNetwork(ClassifierEnsemble([member.load() for member in self.members])).to(device)
