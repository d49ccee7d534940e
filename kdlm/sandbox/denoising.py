"""The training of a small denoiser."""

import copy
import math
from typing import Any

import torch

from kdlm.diffusion import Level, ResidualDenoiser, edm_loss
from kdlm.sandbox.denoisers import TrainedDenoiser
from kdlm.sandbox.digits import digits
from kdlm.sandbox.pretraining import one_thread
from kdlm.sandbox.progress import Progress
from kdlm.sandbox.ring import ring

DECAY = 0.999
HIDDEN = 0.1
"""Share of the labels that is hidden, so that there is an unconditional prediction for guidance."""


def pretrain_denoiser(made: TrainedDenoiser, progress: Progress, name: str) -> tuple[ResidualDenoiser, dict[str, Any]]:
    """Return the trained denoiser, and the figures that its folder keeps."""
    if made.data == "digits":
        train, _ = digits()
        samples, labels = train.images * 2 - 1, train.labels
    else:
        samples, labels = ring(20_000), None
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(made.seed)
        classes, data = (0, 2.0 / math.sqrt(2)) if labels is None else (10, 0.5)
        options = {"width": made.width, "depth": made.depth, "num_classes": classes, "sigma_data": data}
        denoiser = ResidualDenoiser(tuple(samples.shape[1:]), **options)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=made.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, made.steps, made.learning_rate / 20)
        average, losses = copy.deepcopy(denoiser), []
        with progress(f"{name}: training", made.steps) as advance:
            for _ in range(made.steps):
                rows = torch.randint(len(samples), (made.batch,))
                ratio = (made.mean + made.std * torch.randn(made.batch)).exp()
                condition = None
                if labels is not None:
                    hidden = torch.rand(made.batch) < HIDDEN
                    condition = {"labels": torch.where(hidden, classes, labels[rows])}
                level = Level(torch.ones_like(ratio), ratio)
                loss = edm_loss(denoiser, samples[rows], torch.randn_like(samples[rows]), level, condition, data).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for kept, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                        kept.lerp_(now, 1 - DECAY)
                losses.append(loss.item())
                advance(1, f"loss {loss.item():.3f}")
    last = losses[-len(losses) // 10 :]
    return average, {"loss": round(sum(last) / len(last), 4)}
