"""What a finished run's folder holds."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())
