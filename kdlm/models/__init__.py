"""Models: how they are opened, made, pruned, adapted, and read by methods."""

from kdlm.models.adapters import Lora, adapt, merge
from kdlm.models.classifier_ensemble import ClassifierEnsemble, check_classes
from kdlm.models.classifiers import Classifier
from kdlm.models.denoisers import DenoiserSource, DenoiserStudent
from kdlm.models.dual_encoders import DualEncoder, DualEncoderSource, DualEncoderStudent, InheritedStudent, inherit
from kdlm.models.dual_head import DualHead, DualHeadStudent
from kdlm.models.heads import read_head
from kdlm.models.image_classifiers import ImageClassifierSource, ImageClassifierStudent
from kdlm.models.loading import AnySource, AnyStudent, Fresh, Loading, Pretrained, Pruned, Sandbox, device_of, named
from kdlm.models.masked_autoencoders import MaskedAutoencoder, MaskedAutoencoderSource, MaskedAutoencoderStudent
from kdlm.models.prediction import Predictor
from kdlm.models.synthetic import SyntheticImages, SyntheticStudent, load_synthetic
from kdlm.models.views import view

__all__ = [
    "AnySource",
    "AnyStudent",
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
    "ImageClassifierSource",
    "ImageClassifierStudent",
    "InheritedStudent",
    "Loading",
    "Lora",
    "MaskedAutoencoder",
    "MaskedAutoencoderSource",
    "MaskedAutoencoderStudent",
    "Predictor",
    "Pretrained",
    "Pruned",
    "Sandbox",
    "SyntheticImages",
    "SyntheticStudent",
    "adapt",
    "check_classes",
    "device_of",
    "inherit",
    "load_synthetic",
    "merge",
    "named",
    "read_head",
    "view",
]
