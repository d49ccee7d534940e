"""The student as it was before training, to measure what it forgets."""

import copy
from typing import Any

import torch
from torch import nn

from kdlm.models import Predictor, WithoutAdapters, evaluating, without_adapters


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


@torch.no_grad()
def _begins_as_its_base(model: nn.Module) -> bool:
    """Whether a model is a base with adapters that do nothing yet: seen on a few tokens."""
    if not hasattr(model, "disable_adapter") or any("modules_to_save" in name for name, _ in model.named_modules()):
        return False
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with evaluating(model):
        adapted = model(input_ids=ids, use_cache=False).logits
        with without_adapters(model):
            return torch.equal(adapted, model(input_ids=ids, use_cache=False).logits)
