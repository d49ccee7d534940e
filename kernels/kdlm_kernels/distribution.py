"""Softmax of a block of rows, and what a block is."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdlm_kernels.merging import Merge

BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Logits of a block of rows: on a CPU its temporaries stay in the last cache, and several rows feed several threads."""


class Distribution(NamedTuple):
    """`log softmax(x)` and `softmax(x)` of rows `[n, vocab]`."""

    logs: Tensor
    probs: Tensor


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
