"""Heads in pieces: slices of the vocabulary on several ranks, FSDP2's DTensors, ZeRO-3's partitions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from kdlm_kernels.heads import Head


class Shards:
    """Merges what the ranks of a group find on their slices of the vocabulary (see `merging.Merge`).

    Slices follow each other in the order of the ranks and may differ in length. Raises ValueError where the slices of
    student and teacher do not begin at the same ids.

    Args:
        own: ids that this rank's slices score, the student's and, where there is one, the teacher's.
        device: where the group communicates.
    """

    def __init__(self, group: dist.ProcessGroup, own: Sequence[int], device: torch.device):
        self.group, self.ranks = group, dist.get_world_size(group)
        sizes = torch.stack(self._gather(torch.tensor(own, device=device))).tolist()
        self.sizes = [tuple(each) for each in zip(*sizes, strict=True)]
        self.offset = sum(self.sizes[0][: dist.get_rank(group)])
        if len(self.sizes) == 2 and self.sizes[0][:-1] != self.sizes[1][:-1]:
            raise ValueError(
                f"the student's slices of the vocabulary are {list(self.sizes[0])} ids long, the teacher's "
                f"{list(self.sizes[1])}: both must begin at the same ids (only the last may differ)"
            )

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, how, group=self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def argmax(self, x: Tensor) -> Tensor:
        """Return the ids of the largest of each row; of equal ones on several ranks the lowest rank's."""
        here = x.max(-1) if x.shape[-1] else (x.new_full((len(x),), -torch.inf), x.new_zeros(len(x), dtype=torch.int64))
        best = torch.stack(self._gather(here[0])).argmax(0)
        return torch.stack(self._gather(here[1] + self.offset)).gather(0, best[None])[0]

    def size(self, ids: int) -> int:
        return max(self.sizes[0])

    def total(self, which: int, ids: int) -> int:
        return sum(self.sizes[which])

    def hidden_gradient(self, gradient: Tensor) -> None:
        dist.all_reduce(gradient, group=self.group)


def whole(head: Head | None) -> Head | None:
    """Gather the DTensors of a head, once; their gradient is averaged over the mesh, as FSDP2 does with its own."""
    if head is None or not any(isinstance(x, DTensor) for x in (head.weight, head.bias)):
        return head
    weight, bias = (_gathered(x) if isinstance(x, DTensor) else x for x in (head.weight, head.bias))
    return head._replace(weight=weight, bias=bias)


def _gathered(x: DTensor) -> Tensor:
    mesh = x.device_mesh
    everywhere = x.redistribute(placements=[Replicate()] * mesh.ndim)
    # Every rank has the gradient of its own rows. gloo cannot average, so it sums, after the division.
    local = everywhere.to_local(grad_placements=[Partial()] * mesh.ndim)
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / mesh.size())
    return local


@contextmanager
def opened(student: Head | None, teacher: Head | None = None) -> Iterator[None]:
    """Gather heads that DeepSpeed ZeRO-3 keeps in partitions, for as long as the context lasts.

    Raises ValueError for a student's that is trained: its gradient comes after the context has ended.
    """
    ours, theirs = ([x for x in (head or ())[:2] if x is not None and _is_partition(x)] for head in (student, teacher))
    if torch.is_grad_enabled() and any(x.requires_grad for x in ours):
        raise ValueError(
            "the student's head is a ZeRO-3 partition here, with no element of its own: call "
            "deepspeed.zero.register_external_parameter(module, head.weight) once, where module's forward computes "
            "the loss, so that DeepSpeed gathers it for forward and backward"
        )
    if not ours and not theirs:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]  nobody has partitions without it

    with deepspeed.zero.GatheredParameters([*ours, *theirs]):
        yield


def _is_partition(x: Tensor) -> bool:
    return hasattr(x, "ds_id") and x.numel() == 0 and getattr(x, "ds_numel", 0) > 0
