"""The student as it was before training, to measure what it forgets."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdlm.models import Predictor, evaluating
from kdlm.signal import Dense, Hidden, Rows


def start_of(student: Any, device: torch.device) -> Predictor:
    """Return what answers a batch as the student does now.

    Fresh adapters change nothing yet, so a student of adapters alone is asked without them; of any other a frozen copy
    is kept on the device.

    Args:
        student: a causal language model, or a PEFT model around one.
        device: where it will be asked.
    """
    if _begins_as_its_base(student):
        return WithoutAdapters(student)
    return Predictor(copy.deepcopy(student).eval().requires_grad_(False).to(device))


class WithoutAdapters(Predictor):
    """Reads the base of a model that trains adapters."""

    def with_layers(
        self, batch: dict[str, Tensor], rows: Rows, layers: Sequence[int]
    ) -> tuple[Hidden | Dense, list[Tensor]]:
        with _without_adapters(self.module):
            return super().with_layers(batch, rows, layers)


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Switch adapters off; PEFT makes them all trainable when it switches them on again, which is put back."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


@torch.no_grad()
def _begins_as_its_base(model: nn.Module) -> bool:
    """Whether a model is a base with adapters that do nothing yet: seen on a few tokens."""
    if not hasattr(model, "disable_adapter") or any("modules_to_save" in name for name, _ in model.named_modules()):
        return False
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with evaluating(model):
        adapted = model(input_ids=ids, use_cache=False).logits
        with _without_adapters(model):
            return torch.equal(adapted, model(input_ids=ids, use_cache=False).logits)
