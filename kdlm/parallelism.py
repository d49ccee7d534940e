"""Layers sliced over ranks (tensor parallelism) and sequences cut over them: what a run takes, and what it refuses.

A student that transformers has sliced as it was loaded (`distributed_config`) trains on every rank at once: all ranks
read the same rows, the losses merge the ranks' slices of the head, and nothing is averaged. Sequences are cut by
accelerate's `sp_size` (see `kdlm.cut_sequences`); its `cp_size` is refused: see docs/sharding.md.
"""

import os
from collections.abc import Collection
from typing import Any

from kdlm.models import Predictor, tensor_parallel
from kdlm.sharding import ranks


def parallelism_of(args: Any) -> Any:
    """Return accelerate's ParallelismConfig of a run, by arguments or by its launcher; None where there is none."""
    config = getattr(args, "parallelism_config", None)
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        from accelerate import ParallelismConfig

        config = ParallelismConfig()
    return config


def parts_of(config: Any) -> int:
    """Return over how many ranks a ParallelismConfig (or none) has each sequence cut."""
    return getattr(config, "sp_size", 1) or 1


def refuse_cuts(args: Any, student: Any) -> None:
    """Raise ValueError where accelerate was asked, by arguments or by its launcher, for what nobody here would do.

    Args:
        args: the TrainingArguments.
        student: as it was loaded.
    """
    config = parallelism_of(args)
    if getattr(config, "cp_size", 1) > 1:
        raise ValueError(
            "parallelism_config.cp_size: context parallelism has ring attention in place of the model's, which masks "
            "no padding and has no kernel for CPUs, so that it was never run: it is not supported. Use sp_size, see "
            "docs/sharding.md"
        )
    if parts_of(config) > 1 and args.deepspeed_plugin is None:
        raise ValueError(
            "parallelism_config.sp_size: sequence parallelism is DeepSpeed's, and without it every rank would read "
            "whole sequences: say training.deepspeed too, see recipes/accelerate/ulysses.yaml"
        )
    if getattr(config, "tp_size", 1) > 1 and not tensor_parallel(student):
        raise ValueError(
            "parallelism_config.tp_size: the student is whole on every rank, and each would train it alone on the same "
            "rows: load it with distributed_config=DistributedConfig(tp_size=...), or leave tp_size out"
        )


def refuse_beside_slices(args: Any, networks: Any, teacher: Any, needs: Collection[str]) -> None:
    """Raise ValueError, where the student or a teacher is sliced over ranks, for what cannot be had beside it."""
    student, size = networks.student, tensor_parallel(networks.student)
    if not size:
        if tensor_parallel(getattr(teacher, "model", None)):
            raise ValueError(
                "tensor parallelism: the teacher is sliced over ranks and the student is not: its ranks would ask for "
                "different rows. Slice both, or the student alone"
            )
        return
    if size != ranks():
        raise ValueError(f"tensor parallelism: the student is sliced over {size} of {ranks()} ranks: slice it over all")
    beside = {
        "FSDP or DeepSpeed": bool(args.fsdp) or args.deepspeed_plugin is not None,
        "adapters": hasattr(student, "get_base_model"),
        "averages and snapshots of the student": bool(networks.followers),
        "text of its own": "rollouts" in needs,
        "a student that is no causal language model": not isinstance(networks.views["student"], Predictor),
    }
    for what, wanted in beside.items():
        if wanted:
            raise ValueError(f"tensor parallelism: a sliced student was never run with {what}: load it whole")


def refuse_with_slices(student: Any, key: str) -> None:
    """Raise ValueError for a part of a run that reads rows or weights by rank, where the student is sliced."""
    if tensor_parallel(student):
        raise ValueError(f"{key}: it was never run with a student that is sliced over ranks: load it whole")


def refuse_with_parts(accelerator: Any, key: str) -> None:
    """Raise ValueError for a part of a run that was never run where each sequence is cut over ranks."""
    if parts_of(accelerator.parallelism_config) > 1:
        raise ValueError(f"{key}: it was never run with sequences that are cut over ranks (sp_size): leave one out")
