"""Start: the student as it was before training, to measure what it forgets."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdlm.models import Predictor
from kdlm.signal import Dense, Hidden, Rows
from kdlm.teachers import LocalTeacher


class Start:
    """Answers a batch as the student did when this was made.

    Fresh adapters change nothing yet, so a student of adapters alone is asked without them; of any other a frozen copy
    is kept, beside it on its device.

    Args:
        student: a causal language model, or a PEFT model around one.
    """

    def __init__(self, student: Any):
        self.adapted = student if _begins_as_its_base(student) else None
        self._view: Any = Predictor(student) if self.adapted is not None else LocalTeacher(copy.deepcopy(student))

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], rows: Rows) -> Hidden | Dense:
        """Return the signal of the student as it began, at the kept rows."""
        if self.adapted is None:
            return self._view.to(rows.index.device)(batch, rows)
        with _without_adapters(self.adapted):
            return self._view(batch, rows)


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
    training = model.training
    model.eval()
    try:
        adapted = model(input_ids=ids, use_cache=False).logits
        with _without_adapters(model):
            return torch.equal(adapted, model(input_ids=ids, use_cache=False).logits)
    finally:
        model.train(training)
