"""Small networks and a batch for the distribution-matching family."""

from typing import Any

import torch
from small_denoisers import denoiser
from torch import Tensor, nn

from kdlm.diffusion import Denoiser, Karras, VarianceExploding
from kdlm.methods import Step, Trainable
from kdlm.methods.diffusion.method import DiffusionMethod

TIMES = Karras(low=0.1, high=2.5)
STEP = Step(0, 10, seed=3)
FIELDS = {"steps": [2.5], "times": TIMES}


def networks(method: DiffusionMethod, **given: nn.Module) -> dict[str, Any]:
    """A student, a frozen teacher, and what else the method trains, made as the trainer makes it."""
    student, teacher = given.pop("student", denoiser(1)), given.pop("teacher", denoiser(2))
    nets: dict[str, Any] = {"student": student, "teacher": teacher.requires_grad_(False)}
    torch.manual_seed(7)
    for name, role in method.roles.items():
        if isinstance(role, Trainable) and role.make is not None:
            nets[name] = given.get(name) or role.make(student, teacher)
    return nets


def batch(size: int = 6, start: int = 0) -> dict[str, Tensor]:
    """Points with classes."""
    index = torch.arange(start, start + size)
    return {"samples": torch.stack([index.sin(), (2.0 * index).cos()], 1), "labels": index % 3, "index": index}


def reached(nets: dict[str, Any]) -> set[str]:
    """Names of the networks that have a gradient which is not zero."""
    return {
        name
        for name, net in nets.items()
        if any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
    }


def gradient(net: nn.Module) -> Tensor:
    """All gradients of a network in one vector."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


class Normal(Denoiser):
    """The exact denoiser of a normal law in one dimension."""

    prediction = "sample"

    def __init__(self, mean: float | Tensor, std: float | Tensor):
        super().__init__()
        self.form, self.shape = VarianceExploding(), (1,)
        self.mean, self.std = (nn.Parameter(torch.as_tensor(x, dtype=torch.float64)) for x in (mean, std))

    def predict(self, noised: Tensor, time: Tensor, condition: Any, guidance: Any) -> Tensor:
        return posterior(noised, self.mean, self.std, time[:, None])


def posterior(noised: Tensor, mean: Any, std: Any, sigma: Any) -> Tensor:
    """E[x | x + sigma e = noised] where x is normal."""
    return mean + std**2 / (std**2 + sigma**2) * (noised - mean)
