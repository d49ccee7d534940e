"""Evaluation batches in step: where models are sharded, all ranks must run equally many."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from kdlm.deepspeed import partitioned


def in_step(loader: Any, trainer: Any) -> Iterator[tuple[Any, bool]]:
    """Yield the batches of a rank's loader, each with whether it counts.

    A rank that has none left, while others have, is handed one again that does not: sharded models answer to all ranks
    or to none. Ranks ask each other before each batch, and only where student or teacher is sharded.
    """
    networks, teacher = getattr(trainer, "networks", None), getattr(trainer, "teacher", None)
    student = isinstance(networks, FSDPModule) or (networks is not None and partitioned(networks))
    if not student and not getattr(teacher, "in_shards", False):
        yield from ((batch, True) for batch in loader)
        return
    batches, last, accelerator = iter(loader), None, trainer.accelerator
    while True:
        batch = next(batches, None)
        more = torch.tensor(float(batch is not None), device=accelerator.device)
        if not accelerator.reduce(more, reduction="sum"):
            return
        if batch is None and last is None:  # fewer rows than ranks
            last = loader.collate_fn([loader.dataset.rows[0]])
        last = last if batch is None else batch
        yield last, batch is not None
