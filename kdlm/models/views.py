"""How a method sees a network: what it calls with a batch, in place of the bare module."""

from typing import Any

from torch import nn

from kdlm.models.classifiers import Classifier, is_image_classifier
from kdlm.models.dual_encoders import DualEncoder, is_dual_encoder
from kdlm.models.masked_autoencoders import MaskedAutoencoder, is_masked_autoencoder
from kdlm.models.prediction import Predictor, is_text_classifier
from kdlm.models.text_classifiers import TextClassifier


def view(module: nn.Module) -> Any:
    """Return what methods call: a `Predictor` of a language model, a `TextClassifier`, a `Classifier` of images, a
    `DualEncoder`, a `MaskedAutoencoder`, else the module itself.

    A module that says what it `provides` (a denoiser, a set of synthetic images) has the methods' interface already.
    """
    if hasattr(module, "provides"):
        return module
    if is_dual_encoder(module):
        return DualEncoder(module)
    if is_masked_autoencoder(module):
        return MaskedAutoencoder(module)
    if is_text_classifier(module):
        return TextClassifier(module)
    if hasattr(module, "get_output_embeddings") and module.get_output_embeddings() is not None:
        return Predictor(module)
    return Classifier(module) if is_image_classifier(module) else module
