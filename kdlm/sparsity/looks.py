"""What `kdlm check` looks at of the section `sparsity`."""

from collections.abc import Iterator
from typing import Any

from kdlm.methods import Method
from kdlm.models import SyntheticStudent
from kdlm.sparsity.masking import refuse


def looked_at(recipe: Any, method: Method | None) -> Iterator[str]:
    """Look at what keeps a student from being sparse. Raises ValueError that begins with the key."""
    section = recipe.sparsity
    if section is None:
        return
    if getattr(recipe.student, "lora", None) is not None:
        raise ValueError(
            "sparsity: an adapter merged into a pruned weight fills its zeros: train the whole weights (leave "
            "student.lora out)"
        )
    if isinstance(recipe.student, SyntheticStudent):
        raise ValueError("sparsity: the student is a set of images and has no layers: remove the section")
    if getattr(recipe.student, "quantization_aware", None) is not None:
        raise ValueError("sparsity: beside student.quantization_aware it was not tried: remove one of both")
    if recipe.privacy is not None:
        raise ValueError(
            "sparsity: which weights go is read from private rows and not accounted for: remove one of both"
        )
    if method is not None:
        try:
            args = recipe.training.build(output_dir=str(recipe.run_dir), seed=recipe.seed)
            if recipe.evaluation is not None:
                recipe.evaluation.settle(args)
        except ValueError:  # which the look at `training` says
            return
        refuse(args, method, section)
    yield f"sparsity: {section.describe()}"
