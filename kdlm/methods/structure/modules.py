"""What methods on the inside of a student ask of its own forward pass, and of the teacher's."""

from typing import Any


def dense_model(teacher: Any) -> Any:
    """Return the network of a local teacher, whose modules are looked at. Raises ValueError where they cannot be."""
    if hasattr(teacher, "answer_ahead"):
        raise ValueError(
            "teacher: what its modules are given is looked at while it reads a batch; leave out placement: sliced or "
            "auto, and batch_size"
        )
    if (model := getattr(teacher, "model", None)) is None:
        raise ValueError("teacher: the states inside it are asked for, and only a model on this machine has them")
    return model


def once_only(model: Any) -> None:
    """Raise ValueError where a layer is run again in the backward pass: its inputs or noise would be others."""
    if getattr(model, "is_activation_checkpointing", False) and model.training:
        raise ValueError(
            "training.gradient_checkpointing: what this method puts into the student's layers is not there when they "
            "are run a second time; set it to false"
        )
