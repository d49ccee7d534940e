"""Models: how they are opened, made, pruned, adapted, and read by methods."""

from typing import Annotated

from pydantic import Field

from kdlm.models.adapters import Lora, adapt, merge
from kdlm.models.adaptive import adaptive_layers, chosen, noisy
from kdlm.models.adaptive_student import Adaptive
from kdlm.models.classifier_ensemble import ClassifierEnsemble, check_classes
from kdlm.models.classifiers import Classifier
from kdlm.models.denoisers import DenoiserSource, DenoiserStudent
from kdlm.models.dual_encoders import DualEncoder, DualEncoderSource, DualEncoderStudent, InheritedStudent, inherit
from kdlm.models.dual_head import DualHead, DualHeadStudent
from kdlm.models.fake_quantised import fake_quantise, on_the_grid
from kdlm.models.frozen_copies import FrozenCopy, whole
from kdlm.models.heads import read_head
from kdlm.models.hybrids import replaced_layers
from kdlm.models.image_classifiers import ImageClassifierSource, ImageClassifierStudent
from kdlm.models.inside import Ask, Inside, Projections, joined
from kdlm.models.loading import (
    AnySource,
    Fresh,
    Loading,
    Pretrained,
    PretrainedStudent,
    Sandbox,
    SandboxStudent,
    Sliced,
    device_of,
    named,
    telling_files,
)
from kdlm.models.masked_autoencoders import MaskedAutoencoder, MaskedAutoencoderSource, MaskedAutoencoderStudent
from kdlm.models.masked_language_models import MaskedLanguageModel, MaskedStudent
from kdlm.models.modes import evaluating
from kdlm.models.parts import Part, PartReader, refuse_parts
from kdlm.models.prediction import Predictor, layer_paths, mask_id_of, tensor_parallel
from kdlm.models.pruned import Pruned
from kdlm.models.replaced import Replaced
from kdlm.models.retokenised import Retokenised
from kdlm.models.synthetic import SyntheticImages, SyntheticStudent, load_synthetic
from kdlm.models.text_classifiers import TextClassifier, TextClassifierSource, TextClassifierStudent
from kdlm.models.views import view
from kdlm.models.vision_language import VisionLanguage, VisionLanguageStudent
from kdlm.models.without_adapters import WithoutAdapters, begins_as_its_base, without_adapters

AnyStudent = Annotated[
    PretrainedStudent
    | SandboxStudent
    | Fresh
    | Pruned
    | Replaced
    | Adaptive
    | Retokenised
    | MaskedStudent
    | TextClassifierStudent
    | VisionLanguageStudent
    | ImageClassifierStudent
    | DualHeadStudent
    | DualEncoderStudent
    | InheritedStudent
    | MaskedAutoencoderStudent
    | DenoiserStudent
    | SyntheticStudent,
    Field(discriminator="name"),
]
"""A student of a recipe, chosen by its `name`."""

__all__ = [
    "Adaptive",
    "AnySource",
    "AnyStudent",
    "Ask",
    "Classifier",
    "ClassifierEnsemble",
    "DenoiserSource",
    "DenoiserStudent",
    "DualEncoder",
    "DualEncoderSource",
    "DualEncoderStudent",
    "DualHead",
    "DualHeadStudent",
    "Fresh",
    "FrozenCopy",
    "ImageClassifierSource",
    "ImageClassifierStudent",
    "InheritedStudent",
    "Inside",
    "Loading",
    "Lora",
    "MaskedAutoencoder",
    "MaskedAutoencoderSource",
    "MaskedAutoencoderStudent",
    "MaskedLanguageModel",
    "MaskedStudent",
    "Part",
    "PartReader",
    "Predictor",
    "Pretrained",
    "Projections",
    "Pruned",
    "Replaced",
    "Retokenised",
    "Sandbox",
    "Sliced",
    "SyntheticImages",
    "SyntheticStudent",
    "TextClassifier",
    "TextClassifierSource",
    "TextClassifierStudent",
    "VisionLanguage",
    "VisionLanguageStudent",
    "WithoutAdapters",
    "adapt",
    "adaptive_layers",
    "begins_as_its_base",
    "check_classes",
    "chosen",
    "device_of",
    "evaluating",
    "fake_quantise",
    "inherit",
    "joined",
    "layer_paths",
    "load_synthetic",
    "mask_id_of",
    "merge",
    "named",
    "noisy",
    "on_the_grid",
    "read_head",
    "refuse_parts",
    "replaced_layers",
    "telling_files",
    "tensor_parallel",
    "view",
    "whole",
    "without_adapters",
]
