"""The classifiers of the digits that `from_pretrained` opens: teachers and backbones for image methods."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.language_models import torch_release
from kdlm.sandbox.progress import Progress

NOISE = 0.2  # standard deviation of what is added to the images in training, where values span [-1, 1]
SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
BATCH = 64


@dataclass(frozen=True)
class TransformersClassifier:
    """An image classifier of transformers, trained on the digits' training split.

    Attributes:
        model_type: of transformers.
        sizes: of its configuration.
        epochs: passes over the 1,438 images.
        learning_rate: at its peak.
    """

    model_type: str
    sizes: Mapping[str, Any]
    epochs: int
    learning_rate: float
    seed: int = 0

    needs = ()

    def ingredients(self) -> dict[str, Any]:
        rest = {"epochs": self.epochs, "learning_rate": self.learning_rate, "seed": self.seed}
        return {"model_type": self.model_type, "sizes": dict(self.sizes), **rest, "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        import torch
        from transformers import AutoConfig, AutoModelForImageClassification

        from kdlm.sandbox.digits import digits
        from kdlm.sandbox.pretraining import one_thread

        train, test = digits()
        digit_names = {number: str(number) for number in range(10)}
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(self.seed)
            config = AutoConfig.for_model(
                self.model_type,
                num_channels=1,
                id2label=digit_names,
                label2id={shown: number for number, shown in digit_names.items()},
                **self.sizes,
            )
            model = AutoModelForImageClassification.from_config(config).train()
            self._fit(model, train, progress, name)
            model.eval()
            with torch.no_grad():
                right = model(pixel_values=test.images * 2 - 1).logits.argmax(-1) == test.labels
        model.save_pretrained(folder)
        count = sum(parameter.numel() for parameter in model.parameters())
        return {"parameters": count, "test_accuracy": round(right.double().mean().item(), 4)}

    def _fit(self, model: Any, part: Any, progress: Progress, name: str) -> None:
        import torch

        images, steps = part.images * 2 - 1, -(-len(part.labels) // BATCH) * self.epochs
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        with progress(f"{name}: training", steps) as advance:
            for _ in range(self.epochs):
                for chosen in torch.randperm(len(images)).split(BATCH):
                    seen = images[chosen] + NOISE * torch.randn_like(images[chosen])
                    logits = model(pixel_values=seen).logits
                    loss = torch.nn.functional.cross_entropy(logits, part.labels[chosen], label_smoothing=SMOOTHING)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    advance(1, f"loss {loss.item():.3f}")
