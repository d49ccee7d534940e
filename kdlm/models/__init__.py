"""Models: how they are opened, made, pruned, adapted, and read by methods."""

from typing import Annotated

from pydantic import Field

from kdlm.models.adapters import Lora, adapt, merge
from kdlm.models.classifiers import Classifier
from kdlm.models.denoisers import DenoiserSource, DenoiserStudent
from kdlm.models.heads import read_head
from kdlm.models.loading import (
    AnySource,
    Fresh,
    Loading,
    Pretrained,
    PretrainedStudent,
    Pruned,
    Sandbox,
    SandboxStudent,
    device_of,
    named,
)
from kdlm.models.prediction import Predictor
from kdlm.models.views import view
from kdlm.models.vision_language import VisionLanguage, VisionLanguageStudent

AnyStudent = Annotated[
    PretrainedStudent | SandboxStudent | Fresh | Pruned | VisionLanguageStudent | DenoiserStudent,
    Field(discriminator="name"),
]

__all__ = [
    "AnySource",
    "AnyStudent",
    "Classifier",
    "DenoiserSource",
    "DenoiserStudent",
    "Fresh",
    "Loading",
    "Lora",
    "Predictor",
    "Pretrained",
    "Pruned",
    "Sandbox",
    "VisionLanguage",
    "VisionLanguageStudent",
    "adapt",
    "device_of",
    "merge",
    "named",
    "read_head",
    "view",
]
