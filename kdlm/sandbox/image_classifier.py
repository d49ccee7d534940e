"""The classifier of the digits, as the catalogue has it: what it is made from and how its folder is written."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlm.sandbox.language_models import torch_release
from kdlm.sandbox.progress import Progress


@dataclass(frozen=True)
class ImageClassifier:
    """A small convolutional classifier of the digits, trained on their training split.

    Attributes:
        width: of its features.
        epochs: passes over the 1,438 images.
        batch: images a step.
        learning_rate: at the first step; it falls to 0 by half a cosine.
    """

    width: int
    epochs: int
    batch: int
    learning_rate: float
    seed: int

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def ingredients(self) -> dict[str, Any]:
        return {**asdict(self), "torch": torch_release()}

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        from safetensors.torch import save_file

        from kdlm.sandbox.digits_classifier import train

        net, figures = train(self, progress, name)
        save_file(net.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"width": self.width}) + "\n", encoding="utf-8")
        return figures
