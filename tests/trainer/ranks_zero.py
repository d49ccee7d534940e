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
from zero_cases import CASES, STAGES, curve, made

import kdlm.deepspeed

SOME = {1: ("hidden_kd", "turns"), 2: ("hidden_kd", "turns", "in_two", "accumulated"), 3: tuple(CASES)}
"""The cases that are run in each stage: ZeRO-3 has all that the others have, and more."""


def note(folder: Path, name: str, value: Any) -> None:
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(value))


def require_shares(trainer: Any, stage: int, ranks: int) -> None:
    """Assert that as many ranks as were started share what the stage shares."""
    assert trainer.accelerator.num_processes == dist.get_world_size() == ranks
    assert dist.get_backend() == "gloo"
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    everything = list(trainer.networks.parameters())
    trained = sum(p.ds_numel if stage == 3 else p.numel() for p in everything if p.requires_grad)
    moments = [s["exp_avg"].numel() for s in trainer.model_wrapped.optimizer.optimizer.state.values()]
    assert 0 < sum(moments) <= trained / ranks + 64 * len(moments), f"{sum(moments)} of {trained}"
    if stage == 3:
        require_pieces(everything, ranks)


def require_pieces(parameters: Any, ranks: int) -> None:
    for p in parameters:
        assert p.numel() == 0 and p.ds_tensor.numel() == -(-p.ds_numel // ranks)


def curves(folder: Path, ranks: int) -> None:
    for stage in STAGES:
        for case in SOME[stage]:
            trainer = made(folder / f"zero{stage}", case, ranks, stage)
            trainer.train()
            if case != "turns":  # whose last step has switched a role off
                require_shares(trainer, stage, ranks)
            if case == "a sharded teacher":
                require_pieces(trainer.teacher.model.parameters(), ranks)
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


def main(folder: Path, parts: str, ranks: int) -> None:
    for part in parts.split(","):
        {"curves": curves, "gathers": gathers, "saved": saved, "resumed": resumed}[part](folder, ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls what torch renames
    if "WORLD_SIZE" not in os.environ:  # one rank, as `torchrun --nproc-per-node 1` starts it
        place = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a rank may abort in its teardown, with all of its work done
