"""The sizes of a model that say what ranks hold and hand each other of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdlm.models.prediction import decoder_layers


@dataclass(frozen=True)
class Weights:
    """How many weights there are, counted each once.

    Attributes:
        everything: all of them.
        trained: those that get a gradient.
        layers, largest: those in decoder layers, and in the largest one.
        head: those of the output projection.
        bytes: of all of them as they are held.
    """

    everything: int
    trained: int
    layers: int
    largest: int
    head: int
    bytes: int

    @classmethod
    def of(cls, model: Any, parameters: Iterable[Tensor] | None = None) -> "Weights":
        """Count a language model, and what else is among `parameters`."""
        weights = list(model.parameters() if parameters is None else parameters)
        layers = [_count(layer.parameters()) for layer in decoder_layers(model)]
        return cls(
            everything=_count(weights),
            trained=_count(weight for weight in weights if weight.requires_grad),
            layers=sum(layers),
            largest=max(layers),
            head=model.get_output_embeddings().weight.numel(),
            bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        )

    @classmethod
    def of_teacher(cls, teacher: Any) -> "Weights | None":
        """Count the model of a teacher; None where it has none here, or several."""
        model = getattr(teacher, "model", None)
        return None if model is None else cls.of(model)

    @property
    def item(self) -> float:
        """Bytes of a weight."""
        return self.bytes / self.everything

    @property
    def rest(self) -> int:
        """Weights outside the decoder layers: embeddings, head, projectors."""
        return self.everything - self.layers


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
