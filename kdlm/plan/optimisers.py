"""The optimiser of a run, on fake parameters: the one that the Trainer would make, or what holds as much."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

BLOCK, SMALL = 256, 4096
"""Elements of a block that share a scale, and of the smallest tensor that bitsandbytes keeps in 8 bits."""


def optimiser_of(args: TrainingArguments, parameters: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    """Return the optimiser; `kind` is that of the device, whose own way of stepping is taken.

    Raises ValueError where the Trainer does not know it, or its package is missing.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name.endswith("8bit"):
        return EightBit(parameters, states=1 if "lion" in name else 2, paged="paged" in name)
    made, options = Trainer.get_optimizer_cls_and_kwargs(args)
    if kind == "cuda" and made.__module__.startswith("torch.optim") and not options.get("fused"):
        options["foreach"] = True  # torch's own choice on a GPU, in which the temporaries are as large as all weights
    return made(parameters, **options)


class EightBit(torch.optim.Optimizer):
    """Holds what an 8-bit optimiser of bitsandbytes holds; a paged one keeps it in main memory."""

    def __init__(self, parameters: list[nn.Parameter], states: int, paged: bool):
        super().__init__(parameters, {})
        self.states, self.paged = states, paged

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state and not self.paged:
                    self.state[parameter] = {"state": [self._state(parameter) for _ in range(self.states)]}

    def _state(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        count = parameter.numel()
        if count < SMALL:
            return [torch.empty(count)]
        return [torch.empty(count, dtype=torch.uint8), torch.empty(math.ceil(count / BLOCK))]
