"""What methods on the inside of a student ask of its own forward pass, and of the teacher's."""

from typing import Any


def dense_model(teacher: Any) -> Any:
    """Return the network of a local teacher, whose inside is looked at. Raises ValueError for any other teacher."""
    if (model := getattr(teacher, "model", None)) is None:
        raise ValueError("teacher: the states inside it are asked for, and only a model on this machine has them")
    return model


def once_only(model: Any) -> None:
    """Raise ValueError where a layer is run again in the backward pass: it would be given other inputs or noise then."""
    if getattr(model, "is_gradient_checkpointing", False) and model.training:
        raise ValueError(
            "training.gradient_checkpointing: what this method puts into the student's layers is not there when they "
            "are run a second time; set it to false"
        )
