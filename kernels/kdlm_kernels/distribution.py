"""Softmax of a block of rows, and what a block is."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdlm_kernels.merging import Merge

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Logits of a block of rows: on a CPU its temporaries stay in the last cache, and several rows feed several threads."""


@dataclass(frozen=True)
class Distribution:
    """`log softmax(x)` and `softmax(x)` of rows `[n, vocab]`."""

    logs: Tensor
    probs: Tensor

    @cached_property
    def zeros(self) -> Tensor | None:
        """Where probabilities are 0, or None (see `zeros`)."""
        return zeros(self.probs)

    def times(self, x: Tensor) -> Tensor:
        """Return `probs * x` in the place of `x`; 0 where the probability is, whatever `x` is: `0 log 0 = 0`."""
        if self.zeros is not None:
            x.masked_fill_(self.zeros, 0.0)
        return x.mul_(self.probs)


def zeros(p: Tensor) -> Tensor | None:
    """Return where probabilities are 0, or None where they are known to be 0 nowhere.

    A logit of -inf makes a 0, whose logarithm must not be multiplied. On a CPU looking for one costs a twentieth of
    the mask; on a GPU it would wait for the device, and there is always a mask.
    """
    if p.device.type == "cpu" and (not p.numel() or bool(p.amin() > 0)):
        return None
    return p == 0


def blocks(rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Cut the rows of a chunk into blocks whose temporaries are small."""
    step = max(1, BLOCK["cpu" if device.type == "cpu" else "cuda"] // max(1, vocab))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def largest(x: Tensor, merge: Merge) -> Tensor:
    """Return the largest of each row, `[n, 1]`; a slice beyond the shared ids has none of its own."""
    return merge.max(x.amax(-1, keepdim=True) if x.shape[-1] else x.new_full((len(x), 1), -torch.inf))


def softmax(x: Tensor, merge: Merge) -> Distribution:
    """Return both with one exponential per logit."""
    logs = x - largest(x, merge)
    probs = logs.exp()
    total = merge.sum(probs.sum(-1, keepdim=True))
    return Distribution(logs.sub_(total.log()), probs.div_(total))
