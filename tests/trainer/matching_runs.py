"""Runs of the distribution-matching family on points in the plane."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import TrainingArguments

from kdlm.data.images import TensorRows
from kdlm.diffusion import Karras, ResidualDenoiser
from kdlm.diffusion_trainer import DiffusionTrainer
from kdlm.methods.diffusion.adversarial import DMD2Section, FDistillSection
from kdlm.methods.diffusion.method import DiffusionMethod
from kdlm.methods.diffusion.reverse_kl import DMDSection
from kdlm.methods.diffusion.score_implicit import SiDSection

FIELDS = {"steps": [2.5, 0.8], "times": Karras(low=0.1, high=2.5), "ema": 0.9}
HEADS = {"layers": ["blocks.0"], "width": 8, "own_weight": 1.0, "weight": 0.1}
SECTIONS = {
    "dmd": DMDSection(**FIELDS, ratio=2),
    "dmd2": DMD2Section(**FIELDS, ratio=1, discriminator=HEADS),
    "f_distill": FDistillSection(**FIELDS, ratio=1, discriminator=HEADS),
    "f_distill by turns": FDistillSection(**FIELDS, ratio=2, cadence="exclusive", discriminator=HEADS),
    "sid": SiDSection(**FIELDS),
}


def denoiser(seed: int) -> ResidualDenoiser:
    torch.manual_seed(seed)
    made = ResidualDenoiser((2,), width=16, depth=2, num_classes=3)
    nn.init.normal_(made.leave.weight, std=0.3)
    return made


def trainer(arguments: Callable[..., TrainingArguments], method: DiffusionMethod, **options) -> DiffusionTrainer:
    index = torch.arange(40)
    points = torch.stack([index.sin(), (2.0 * index).cos()], 1)
    torch.manual_seed(5)  # of the heads
    return DiffusionTrainer(
        denoiser(1), denoiser(2), arguments(**options), method=method,
        train_dataset=TensorRows({"samples": points, "labels": index % 3, "index": index}),
    )  # fmt: skip


def weights(run: DiffusionTrainer) -> dict[str, torch.Tensor]:
    nets = {**run.networks.role, **run.networks.averages}
    return {f"{name}.{key}": p.detach().clone() for name, net in nets.items() for key, p in net.named_parameters()}
