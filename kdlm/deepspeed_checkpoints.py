"""DeepSpeed's checkpoints: taken up by as many ranks as have saved them, or by others.

They are DeepSpeed's own files, pickled: go on from your own runs alone.
"""

import os
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def load(engine: Any, folder: Path) -> None:
    """Load weights and optimiser state that as many ranks or others have saved; each rank must ask.

    DeepSpeed's own files are for the number of ranks that wrote them: for another one rank 0 turns them into its
    universal checkpoint, beside the run's checkpoints and for as long as the ranks read it.
    """
    step = (folder / "latest").read_text().strip()
    wrote = len(list((folder / step).glob("*_optim_states.pt")))
    if wrote == dist.get_world_size():
        engine.load_checkpoint(str(folder))
        return
    if engine.sequence_parallel_size > 1 and engine.zero_optimization_stage() < 3:
        raise ValueError(
            f"{folder} is of {wrote} ranks, and under ZeRO-1 and 2 DeepSpeed takes ranks that share sequences "
            "(sp_size) for slices of layers: go on with as many, or train under ZeRO-3"
        )
    _require_pieces_for_all(engine, dist.get_world_size())
    between = folder.parent / f".universal-{step}"
    if dist.get_rank() == 0:
        shutil.rmtree(between, ignore_errors=True)
        _to_universal(folder / step, between / step)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(between))
    engine._config.load_universal_checkpoint = False
    if engine.zero_optimization_stage() == 3:
        _as_each_group_was(engine.optimizer, between / step / "zero" / "optimizer_state.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(between)


def _require_pieces_for_all(engine: Any, ranks: int) -> None:
    """Raise ValueError where a rank would hold nothing of a group: DeepSpeed then finds no step count to take up."""
    if engine.zero_optimization_stage() == 3:
        return
    optimizer = engine.optimizer
    for group, weights, piece in zip(
        optimizer.param_groups, optimizer.bit16_groups, optimizer.partition_size, strict=True
    ):
        if (size := sum(p.numel() for p in weights)) <= (ranks - 1) * piece:
            raise ValueError(
                f"DeepSpeed cannot take this checkpoint up on {ranks} ranks: the role {group['role']!r} has a group of "
                f"{size} weights, and not every rank would have one of them: go on with fewer ranks, or under ZeRO-3"
            )


def _to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        ds_to_universal.main(
            SimpleNamespace(input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options)
        )


def _as_each_group_was(optimizer: Any, path: Path) -> None:
    """Give each group its own settings and count of steps: DeepSpeed's ZeRO-3 gives all of them those of the first."""
    saved = torch.load(path, weights_only=False)["optimizer_state_dict"]
    base, place = optimizer.optimizer, optimizer.sub_group_to_group_id
    for group, own in zip(base.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in own.items() if key != "params"})
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        own = saved["state"].get(saved["param_groups"][place[number]]["params"][0])
        if own is not None:
            base.state[flat]["step"] = own["step"].clone()


def require_kind(folder: Path, zero: bool) -> None:
    """Raise ValueError where a checkpoint of DeepSpeed's is to go on without it, or another with it."""
    if (folder / "latest").is_file() == zero:
        return
    raise ValueError(
        f"{folder}: saved without DeepSpeed, whose optimiser cannot take it up: go on without training.deepspeed"
        if zero
        else f"{folder}: saved under DeepSpeed: go on with training.deepspeed, on any number of ranks (one, too: "
        "torchrun --nproc-per-node 1)"
    )
