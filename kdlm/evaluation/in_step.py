"""Evaluation batches in step: all ranks sum the same figures, and where models are sharded run equally many batches."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from kdlm.deepspeed import partitioned


def in_step(loader: Any, trainer: Any) -> Iterator[tuple[Any, bool]]:
    """Yield the batches of a rank's loader, each with whether it counts.

    A rank that has none left, while others have, is handed one again that does not: sharded models answer to all ranks
    or to none. Ranks ask each other before each batch, and only where student or teacher is sharded. One that has none
    at all (fewer images than ranks) reads a row that does not count: it must know what the others sum.
    """
    networks, teacher = getattr(trainer, "networks", None), getattr(trainer, "teacher", None)
    student = isinstance(networks, FSDPModule) or (networks is not None and partitioned(networks))
    if not student and not getattr(teacher, "in_shards", False):
        none = True
        for batch in loader:
            none = False
            yield batch, True
        if none and trainer.args.world_size > 1 and (nothing := _of_others(loader)) is not None:
            yield nothing, False
        return
    batches, last, accelerator = iter(loader), None, trainer.accelerator
    while True:
        batch = next(batches, None)
        more = torch.tensor(float(batch is not None), device=accelerator.device)
        if not accelerator.reduce(more, reduction="sum"):
            return
        if batch is None and last is None:
            last = _of_others(loader)
        last = last if batch is None else batch
        yield last, batch is not None


def _of_others(loader: Any) -> Any:
    """Return a batch of the first row of all ranks, for a rank that has no row; None where there is none."""
    rows = getattr(getattr(loader, "dataset", None), "rows", ())
    return loader.collate_fn([rows[0]]) if len(rows) else None
