"""Language models: how they are opened, made, pruned, adapted, and read as signals."""

from kdlm.models.adapters import Lora, adapt, merge
from kdlm.models.heads import read_head
from kdlm.models.loading import AnySource, AnyStudent, Fresh, Loading, Pretrained, Pruned, Sandbox, device_of, named
from kdlm.models.prediction import Predictor

__all__ = [
    "AnySource",
    "AnyStudent",
    "Fresh",
    "Loading",
    "Lora",
    "Predictor",
    "Pretrained",
    "Pruned",
    "Sandbox",
    "adapt",
    "device_of",
    "merge",
    "named",
    "read_head",
]
