"""One rank of tests/trainer/test_deepspeed.py; started by `forks.on_ranks`.

`ranks_zero.py FOLDER PART RANKS WORDS`: runs what a part names under DeepSpeed, and rank 0 leaves the losses of each.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from zero_cases import CASES, STAGES, as_a_rank, curve, made, shares

import kdlm.deepspeed

SOME = {1: ("hidden_kd", "turns"), 2: ("hidden_kd", "turns", "in_two", "accumulated"), 3: tuple(CASES)}
"""The cases that are run in each stage: ZeRO-3 has all that the others have, and more."""


def note(folder: Path, name: str, value: Any) -> None:
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(value))


def curves(folder: Path, ranks: int) -> None:
    for stage in STAGES:
        for case in SOME[stage]:
            trainer = made(folder / f"zero{stage}", case, ranks, stage)
            trainer.train()
            assert trainer.model_wrapped.zero_optimization_stage() == stage
            assert ("a sharded" in case) == trainer.teacher.in_shards
            shares(trainer, ranks)
            note(folder, f"{stage}-{case}", curve(trainer))


def gathers(folder: Path, ranks: int) -> None:
    """Count how often each head is gathered in a step of ZeRO-3."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    trainer = made(folder, "a sharded teacher", ranks, 3)
    head, seen = trainer.student.lm_head.weight, {"student": 0, "teacher": 0}
    fetch, copied = Coordinator.fetch_sub_module, kdlm.deepspeed.copied

    def fetching(self: Any, module: Any, forward: bool) -> None:
        away = getattr(head, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        fetch(self, module, forward)
        seen["student"] += away and head.ds_status == ZeroParamStatus.AVAILABLE

    def copying(weight: Any) -> Any:
        seen["teacher"] += 1
        return copied(weight)

    Coordinator.fetch_sub_module, kdlm.deepspeed.copied = fetching, copying
    trainer.train()
    Coordinator.fetch_sub_module, kdlm.deepspeed.copied = fetch, copied
    note(folder, "gathers", seen)


def saved(folder: Path, ranks: int) -> None:
    for stage in (2, 3):
        trainer = made(folder / f"zero{stage}", "turns", ranks, stage, save_strategy="steps", save_steps=2)
        trainer.train()
        note(folder, f"unbroken-{stage}", curve(trainer))


def resumed(folder: Path, ranks: int) -> None:
    for stage in (2, 3):
        trainer = made(folder / f"zero{stage}", "turns", ranks, stage)
        trainer.train(resume_from_checkpoint=str(folder / f"zero{stage}" / "turns" / "checkpoint-2"))
        assert trainer.accelerator.num_processes == dist.get_world_size() == ranks
        note(folder, f"resumed-{stage}-{ranks}", curve(trainer))


def verb(folder: Path, ranks: int) -> None:
    """`kdlm train` of a recipe, which leaves a plain folder."""
    from kdlm.recipe import load
    from kdlm.train import train

    train(load(folder / "recipe.yaml"))


def main(folder: Path, parts: str, ranks: int) -> None:
    for part in parts.split(","):
        {"curves": curves, "gathers": gathers, "saved": saved, "resumed": resumed, "verb": verb}[part](folder, ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls what torch renames
    as_a_rank()
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a rank may abort in its teardown, with all of its work done
