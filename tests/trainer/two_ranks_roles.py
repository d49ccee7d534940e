"""One rank of `test_two_ranks_with_roles_that_take_turns_equal_one_process`; started by `forks.on_ranks`.

`two_ranks_roles.py FOLDER`: five steps of distribution matching in which student and fake network take turns, under DDP
and again under FSDP2, resumed once; rank 0 writes the weights of every role.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from role_models import adam_steps
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainingArguments

from kdlm.data import TensorRows
from kdlm.diffusion import Karras, MixtureDenoiser, ResidualDenoiser
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.methods.diffusion.distribution_matching import DistributionMatching


class Precise(ResidualDenoiser):
    """Computes in float64, whatever the noise is drawn in: two ways of adding up then agree."""

    def predict(self, noised: Tensor, time: Tensor, condition: Any, guidance: Any) -> Tensor:
        return super().predict(noised.double(), time.double(), condition, guidance)


def made(folder: Path, batch: int, **options: Any) -> DiffusionTrainer:
    """A trainer in float64, the same on every rank but for the size of its batch."""
    torch.manual_seed(4)
    student = Precise((2,), width=16, depth=1)
    torch.nn.init.normal_(student.leave.weight, std=0.1)
    teacher = MixtureDenoiser(torch.randn(3, 2), 0.1, torch.full((3,), 1 / 3))
    method = DistributionMatching(
        steps=[5.0, 1.0], times=Karras(low=0.1, high=5.0), ratio=3, cadence="exclusive", fake="student", ema=0.8
    )
    args = TrainingArguments(
        output_dir=str(folder / "run"), report_to="none", use_cpu=True, max_steps=5, learning_rate=1e-2, seed=3,
        per_device_train_batch_size=batch, optim="adamw_torch", lr_scheduler_type="constant", max_grad_norm=0.5,
        logging_steps=5, disable_tqdm=True, **{"save_strategy": "no", **options},
    )  # fmt: skip
    if "fsdp" in options:  # accelerate shards where it believes to be on GPUs; gloo and a CPU do as well
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = TensorRows({"samples": torch.zeros(16, 2, dtype=torch.float64), "index": torch.arange(16)})
    return DiffusionTrainer(student.double(), teacher.double(), args, method=method, train_dataset=rows)


def everything(trainer: DiffusionTrainer) -> dict[str, Tensor]:
    """Copies of the weights of all roles, whole."""
    found = {}
    for role, module in {**trainer.networks.role, **trainer.networks.averages}.items():
        for name, p in module.named_parameters():
            found[f"{role}.{name}"] = getattr(p, "full_tensor", lambda p=p: p)().detach().clone().contiguous()
    return found


def under_ddp(folder: Path) -> DiffusionTrainer:
    trainer = made(folder / "ddp", batch=4)
    trainer.train()
    assert trainer.args.ddp_find_unused_parameters is True
    return trainer


def under_fsdp(folder: Path) -> DiffusionTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    options = {"fsdp": True, "fsdp_config": config}
    trainer = made(folder / "fsdp", batch=4, **options, save_strategy="steps", save_steps=2)
    trainer.train()
    assert {tuple(p.to_local().shape) for p in trainer.networks.parameters() if p.shape == (16, 2)} == {(8, 2)}
    resumed = made(folder / "fsdp", batch=4, **options)
    resumed.train(resume_from_checkpoint=str(folder / "fsdp" / "run" / "checkpoint-2"))
    again, whole = everything(resumed), everything(trainer)
    assert all(torch.equal(again[name], value) for name, value in whole.items()), "a resumed run ends elsewhere"
    return trainer


def main(folder: Path) -> None:
    for kind, train in (("ddp", under_ddp), ("fsdp", under_fsdp)):
        trainer = train(folder)
        assert adam_steps(trainer) == {"student": {2}, "fake": {3}}, adam_steps(trainer)
        weights = everything(trainer)
        if trainer.is_world_process_zero():
            save_file(weights, folder / f"{kind}.safetensors")
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a rank may abort in its teardown, with all of its work done
