"""Opening a denoiser from its folder."""

import json
from pathlib import Path
from typing import Any

import torch

from kdlm.diffusion.denoiser import CONFIG, Denoiser
from kdlm.diffusion.small import MixtureDenoiser, ResidualDenoiser


def load_denoiser(folder: str | Path) -> Denoiser:
    """Return the denoiser that `save_pretrained` wrote. Raises ValueError when the folder holds none."""
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no denoiser here ({CONFIG} is missing)")
    made = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    denoiser = _built(made.pop("kind", None), made, folder)
    denoiser.load_weights(folder)
    return denoiser


def _built(kind: str | None, made: dict[str, Any], folder: Path) -> Denoiser:
    if kind == "residual":
        return ResidualDenoiser(**made)
    if kind == "mixture":
        modes = made["modes"]
        return MixtureDenoiser(torch.zeros(modes, made["width"]), made["std"], torch.ones(modes) / modes)
    raise ValueError(f"{folder / CONFIG}: unknown kind {kind!r}")
