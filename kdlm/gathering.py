"""The rows of all ranks, for losses that compare the rows of a batch with each other."""

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(*tensors: Tensor) -> tuple[list[Tensor], slice]:
    """Return each tensor with the rows of all ranks, and the slice of them that is this rank's own.

    Gradients flow back to the rank that a row came from, and are summed there over the ranks: take the values of the
    own rows alone, and the ranks together have the gradient of one process with the whole batch. All ranks must call
    it with equally many rows. It is the identity where there is one process, and wherever gradients are off:
    in evaluation the ranks go through different numbers of batches, so there each compares its own rows.
    """
    rows = len(tensors[0])
    if not (dist.is_available() and dist.is_initialized() and torch.is_grad_enabled()) or dist.get_world_size() == 1:
        return list(tensors), slice(0, rows)
    from torch.distributed.nn.functional import all_gather

    start = dist.get_rank() * rows
    return [torch.cat(list(all_gather(tensor))) for tensor in tensors], slice(start, start + rows)
