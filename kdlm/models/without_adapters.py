"""The base of a model that trains adapters, read without them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdlm.models.inside import Ask, Inside
from kdlm.models.modes import evaluating
from kdlm.models.prediction import Predictor
from kdlm.signal import Dense, Hidden, Rows


class WithoutAdapters(Predictor):
    """Reads the base of a model that trains adapters, also where it trains modules in full (`modules_to_save`)."""

    def inside(
        self, batch: dict[str, Tensor], rows: Rows, ask: Ask, predicted: Rows | None = None
    ) -> tuple[Hidden | Dense | None, Inside]:
        with without_adapters(self.module):
            return super().inside(batch, rows, ask, predicted)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Switch adapters off; PEFT makes them all trainable when it switches them on again, which is put back."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


@torch.no_grad()
def begins_as_its_base(model: nn.Module) -> bool:
    """Say whether a model is a base with adapters that do nothing yet: seen on a few tokens."""
    if not hasattr(model, "disable_adapter") or any("modules_to_save" in name for name, _ in model.named_modules()):
        return False
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with evaluating(model):
        adapted = model(input_ids=ids, use_cache=False).logits
        with without_adapters(model):
            return torch.equal(adapted, model(input_ids=ids, use_cache=False).logits)
