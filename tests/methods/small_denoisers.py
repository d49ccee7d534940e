"""Tiny denoisers, rows and runs for tests of diffusion methods."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from kdlm.data import TensorRows
from kdlm.diffusion import MixtureDenoiser, ResidualDenoiser
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.methods import Method


def denoiser(
    seed: int = 0, width: int = 16, *, classes: int = 3, shape: tuple[int, ...] = (2,), **options: Any
) -> ResidualDenoiser:
    """A denoiser with random weights in its last layer too."""
    torch.manual_seed(seed)
    made = ResidualDenoiser(shape, width=width, depth=2, num_classes=classes, **options)
    nn.init.normal_(made.leave.weight, std=0.3)
    return made


def mixture(std: float = 0.1) -> MixtureDenoiser:
    """The exact denoiser of two Gaussians."""
    return MixtureDenoiser(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), std, torch.tensor([0.5, 0.5]))


def rows(count: int = 12, *, classes: int = 3) -> TensorRows:
    """Points with classes in turn."""
    drawn = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    labels = {"labels": torch.arange(count) % classes} if classes else {}
    return TensorRows({"samples": drawn, **labels, "index": torch.arange(count)})


def batch_of(count: int = 12, *, double: bool = False, **options: Any) -> dict[str, Tensor]:
    """All rows as one batch."""
    columns = dict(rows(count, **options).columns)
    return {key: value.double() if double and key == "samples" else value for key, value in columns.items()}


def run(folder: Path, method: Method, student: Any, teacher: Any, data: TensorRows, **options: Any) -> DiffusionTrainer:
    """A trainer of a few plain steps on a CPU."""
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(**{**defaults, **options})
    return DiffusionTrainer(student, teacher, args, method=method, train_dataset=data, eval_dataset=rows(8))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors of a network."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
