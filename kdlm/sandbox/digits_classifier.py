"""A classifier of the digits whose features measure how good generated digits are."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from kdlm.sandbox.catalog import build
from kdlm.sandbox.digits import Digits, digits
from kdlm.sandbox.image_classifier import ImageClassifier
from kdlm.sandbox.pretraining import one_thread
from kdlm.sandbox.progress import Progress, console

NOISE = 0.2  # standard deviation of what is added to the images in training, where values span [-1, 1]
SMOOTHING = 0.1
WEIGHT_DECAY = 1e-2


class DigitsClassifier(nn.Module):
    """Two convolutions and two linear layers on 8 x 8 images in [-1, 1], which is `2 x - 1` of `digits()`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 16, 3, padding=1)
        self.coarse = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.features = nn.Linear(32 * 4 * 4, width)
        self.logits = nn.Linear(width, 10)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, images: Float[Tensor, "n 1 8 8"]) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n 10"]]:
        """Return (features, logits); the features have mean 0 and spread 1 over the training images."""
        hidden = self.features(silu(self.coarse(silu(self.fine(images)))).flatten(1))
        return (hidden - self.mean) / self.spread, self.logits(silu(hidden))

    @torch.no_grad()
    def standardise(self, images: Float[Tensor, "n 1 8 8"]) -> None:
        """Take these images for those over which the features have mean 0 and spread 1."""
        features = self(images)[0]
        self.mean, self.spread = features.mean(0), features.std(0)


def digits_classifier(*, cache: Path | None = None, progress: Progress | None = console) -> DigitsClassifier:
    """Return the sandbox's classifier of digits, frozen and in evaluation mode; builds it when missing: seconds.

    Called with images in [-1, 1] it returns (features [n, 32], logits [n, 10]), as `kdlm.quality` expects. Raises
    ImportError when it must be built and scikit-learn, whose data it is, is not installed.
    """
    from safetensors.torch import load_file

    folder = build("digits-classifier", cache=cache, progress=progress)
    net = DigitsClassifier(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.eval().requires_grad_(False)


def train(spec: ImageClassifier, progress: Progress, name: str) -> tuple[DigitsClassifier, dict[str, Any]]:
    """Return a trained classifier and the figures that its folder keeps. The caller's random state stays as it is."""
    train_part, test_part = digits()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(spec.seed)
        net = DigitsClassifier(spec.width)
        _fit(net, train_part, spec, progress, name)
        net.standardise(train_part.images * 2 - 1)
        accuracy = _accuracy(net, test_part)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return net, {"parameters": parameters, "test_accuracy": round(accuracy, 4)}


def _fit(net: DigitsClassifier, part: Digits, spec: ImageClassifier, progress: Progress, name: str) -> None:
    images, steps = part.images * 2 - 1, -(-len(part.labels) // spec.batch) * spec.epochs
    optimizer = torch.optim.AdamW(net.parameters(), lr=spec.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(f"{name}: training", steps) as advance:
        for _ in range(spec.epochs):
            for chosen in torch.randperm(len(images)).split(spec.batch):
                seen = images[chosen] + NOISE * torch.randn_like(images[chosen])
                loss = cross_entropy(net(seen)[1], part.labels[chosen], label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(1, f"loss {loss.item():.3f}")


@torch.no_grad()
def _accuracy(net: DigitsClassifier, part: Digits) -> float:
    return (net(part.images * 2 - 1)[1].argmax(-1) == part.labels).double().mean().item()
