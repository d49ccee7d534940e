"""The base of a model that trains adapters, read without them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kdlm.models.prediction import Predictor
from kdlm.signal import Dense, Hidden, Rows


class WithoutAdapters(Predictor):
    """Reads the base of a model that trains adapters, also where it trains modules in full (`modules_to_save`)."""

    def with_layers(
        self, batch: dict[str, Tensor], rows: Rows, layers: Sequence[int]
    ) -> tuple[Hidden | Dense, list[Tensor]]:
        with without_adapters(self.module):
            return super().with_layers(batch, rows, layers)


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
