"""One rank of `test_two_ranks_with_roles_that_take_turns_equal_one_process`; started by torchrun.

`two_ranks_roles.py FOLDER`: five steps of distribution matching in which student and fake network take turns, under DDP
and again under FSDP2; rank 0 writes the weights of every role. FSDP2 is torch's fully_shard on each role and on their
one parent, because accelerate's does not shard on a CPU.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
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


def made(folder: Path, batch: int) -> DiffusionTrainer:
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
        save_strategy="no", logging_steps=5, disable_tqdm=True,
    )  # fmt: skip
    rows = TensorRows({"samples": torch.zeros(16, 2, dtype=torch.float64), "index": torch.arange(16)})
    return DiffusionTrainer(student.double(), teacher.double(), args, method=method, train_dataset=rows)


def everything(trainer: DiffusionTrainer) -> dict[str, Tensor]:
    """Copies of the weights of all roles, whole."""
    found = {}
    for role, module in {**trainer.networks.role, **trainer.networks.averages}.items():
        for name, p in module.named_parameters():
            found[f"{role}.{name}"] = getattr(p, "full_tensor", lambda p=p: p)().detach().clone().contiguous()
    return found


def shard(trainer: DiffusionTrainer) -> None:
    """Shard every role and the parent of all, and tell the Trainer to leave the model as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in trainer.networks.role.values():
        fully_shard(module, mesh=mesh)
    fully_shard(trainer.networks, mesh=mesh)
    trainer.is_distributed_loading_by_transformers = True
    halves = {p.to_local().shape[0] * 2 for p in trainer.networks.parameters() if p.shape[0] == 16}
    assert halves == {16}, "a rank does not hold half of each weight"


def trained(kind: str, folder: Path) -> None:
    trainer = made(folder, batch=4)
    if kind == "fsdp":
        shard(trainer)
    trainer.train()
    assert trainer.args.ddp_find_unused_parameters is True
    assert adam_steps(trainer) == {"student": {2}, "fake": {3}}, adam_steps(trainer)
    weights = everything(trainer)
    if trainer.is_world_process_zero():
        save_file(weights, folder / f"{kind}.safetensors")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp"):
        trained(kind, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a rank may abort in its teardown, with all of its work done
