"""Small denoisers for a CPU: a residual MLP in EDM's preconditioning, and the exact one of a Gaussian mixture."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdlm.diffusion.denoiser import Condition, Denoiser
from kdlm.diffusion.forms import VarianceExploding
from kdlm.diffusion.level import Level, over


class ResidualDenoiser(Denoiser):
    """A residual MLP on flattened samples, preconditioned as EDM (arXiv 2206.00364, table 1).

    Args:
        shape: of one sample.
        width, depth: of the hidden layers.
        num_classes: of the condition `labels`; one class more stands for none. 0 is unconditional.
        sigma_data: standard deviation of the data.
        guided: whether it takes a guidance scale as an input; its embedding starts at zero.
    """

    prediction = "sample"
    frequencies: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        width: int = 128,
        depth: int = 3,
        num_classes: int = 0,
        sigma_data: float = 0.5,
        guided: bool = False,
    ):
        super().__init__()
        self.shape, self.form = tuple(shape), VarianceExploding()
        self.width, self.depth, self.num_classes, self.sigma_data = width, depth, num_classes, sigma_data
        size = int(torch.tensor(self.shape).prod())
        self.register_buffer("frequencies", torch.linspace(0, 3, 16).exp(), persistent=False)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.takes_guidance = guided
        self.guidance = _zero(nn.Linear(32, width)) if guided else None
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.leave = _zero(nn.Linear(width, size))

    def configuration(self) -> dict[str, Any]:
        named = ("width", "depth", "num_classes", "sigma_data")
        own = {name: getattr(self, name) for name in named}
        return {"kind": "residual", "shape": list(self.shape), **own, "guided": self.takes_guidance}

    def with_guidance(self) -> "ResidualDenoiser":
        made: dict[str, Any] = self.configuration() | {"guided": True}
        del made["kind"]
        denoiser = ResidualDenoiser(**made)
        own = self.state_dict()
        denoiser.load_state_dict({key: own.get(key, value) for key, value in denoiser.state_dict().items()})
        return denoiser

    def unconditional(self, condition: Condition) -> Condition:
        return {"labels": torch.full_like(condition["labels"], self.num_classes)}

    def predict(self, noised: Tensor, time: Tensor, condition: Condition | None, guidance: Tensor | None) -> Tensor:
        sigma, data = over(time, noised), self.sigma_data
        total = sigma.square() + data**2
        inner = self._network(noised * total.rsqrt(), time.log() / 4, condition, guidance)
        return noised * data**2 / total + inner * sigma * data * total.rsqrt()

    def _network(self, x: Tensor, noise: Tensor, condition: Condition | None, guidance: Tensor | None) -> Tensor:
        about = self.time(self._waves(noise))
        if self.label is not None:
            if condition is None:
                condition = {"labels": torch.full((len(x),), self.num_classes, device=x.device)}
            about = about + self.label(condition["labels"])
        if self.guidance is not None and guidance is not None:
            about = about + self.guidance(self._waves(guidance))
        hidden = self.enter(x.flatten(1)) + about
        for block in self.blocks:
            hidden = block(hidden, about)
        return self.leave(nn.functional.silu(hidden)).reshape(x.shape)

    def _waves(self, value: Float[Tensor, "batch"]) -> Float[Tensor, "batch 32"]:
        phase = value[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], -1)


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor, about: Tensor) -> Tensor:
        return hidden + self.second(nn.functional.silu(self.first(self.norm(hidden) + about)))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MixtureDenoiser(Denoiser):
    """The exact posterior mean of x_0 where the data are a mixture of round Gaussians: a teacher without error.

    Args:
        centres: of the components.
        std: standard deviation of each component.
        weights: their shares.
    """

    prediction = "sample"
    centres: Tensor
    shares: Tensor

    def __init__(self, centres: Float[Tensor, "modes width"], std: float, weights: Float[Tensor, "modes"]):
        super().__init__()
        self.form, self.std = VarianceExploding(), std
        self.register_buffer("centres", centres)
        self.register_buffer("shares", weights)
        self.shape = (centres.shape[1],)

    def configuration(self) -> dict[str, Any]:
        return {"kind": "mixture", "modes": len(self.centres), "width": self.shape[0], "std": self.std}

    def predict(self, noised: Tensor, time: Tensor, condition: Condition | None, guidance: Tensor | None) -> Tensor:
        # Component k at noise sigma is N(m_k, s^2 + sigma^2), and in it E[x_0] = m_k + s^2 (x - m_k) / (s^2 + sigma^2).
        variance = (self.std**2 + time.square())[:, None]
        offset = noised[:, None, :] - self.centres
        logits = self.shares.log() - offset.square().sum(-1) / (2 * variance)
        means = self.centres + self.std**2 / variance[..., None] * offset
        return (torch.softmax(logits, -1)[..., None] * means).sum(1)


def edm_loss(
    denoiser: Any, clean: Tensor, noise: Tensor, level: Level, condition: Condition | None, sigma_data: float = 0.5
) -> Float[Tensor, "batch"]:
    """Return EDM's weighted denoising error of each sample, mean over its elements (arXiv 2206.00364, table 1).

    The weight at ratio r is `1 / r^2 + 1 / sigma_data^2`.
    """
    error = denoiser(level.noised(clean, noise), level, condition) - clean
    return (level.ratio**-2 + sigma_data**-2) * error.float().square().flatten(1).mean(1)
