"""The student as it was before training, to measure what it forgets."""

import copy
from typing import Any

import torch

from kdlm.models import Predictor, WithoutAdapters, begins_as_its_base


def start_of(student: Any, device: torch.device) -> Predictor:
    """Return what answers a batch as the student does now.

    Fresh adapters change nothing yet, so a student of adapters alone is asked without them; of any other a frozen copy
    is kept on the device.

    Args:
        student: a causal language model, or a PEFT model around one.
        device: where it will be asked.
    """
    if begins_as_its_base(student):
        return WithoutAdapters(student)
    return Predictor(copy.deepcopy(student).eval().requires_grad_(False).to(device))
