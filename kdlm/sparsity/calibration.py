"""Norms of what linear layers read, over the tokens of some text: the other half of Wanda's scores."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlm.losses import real_rows
from kdlm.models import evaluating


@torch.no_grad()
def input_norms(
    student: Any, layers: dict[str, nn.Linear], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Float[Tensor, "in"]]:
    """Return the l2 norm of each input feature of each layer over all real tokens (arXiv 2306.11695, eq. 1).

    Args:
        student: a `Predictor`.
        layers: by name.
        batches: on the student's device. Padding is left out.

    Raises ValueError for a layer that read nothing.
    """
    sums: dict[str, Tensor] = {}

    def reads(name: str, batch: dict[str, Tensor]):
        rows, shape = real_rows(batch), batch["input_ids"].shape

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read = rows.select(args[0]) if args[0].shape[:2] == shape else args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + read.double().square().sum(0)

        return hook

    with evaluating(student.module):
        for batch in batches:
            handles = [layer.register_forward_pre_hook(reads(name, batch)) for name, layer in layers.items()]
            try:
                student(batch, real_rows(batch))
            finally:
                for handle in handles:
                    handle.remove()
    if silent := sorted(layers.keys() - sums.keys()):
        raise ValueError(f"sparsity.criterion: wanda: {silent[0]} read none of the calibration rows: use magnitude")
    return {name: value.sqrt().float() for name, value in sums.items()}
