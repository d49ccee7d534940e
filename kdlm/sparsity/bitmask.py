"""Sparse weights on disk: one bit for each weight, and those that are not zero.

For storage alone: no engine reads it. vLLM no longer reads sparse formats (vllm-project/vllm#36799, March 2026), nor
does `compressed-tensors` 0.20 write them; what runs a model is the plain folder, which `expand` gives back bit for bit.
"""

import json
import math
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from kdlm.packs.quantization import from_bits, to_bits

SUFFIX = ".bitmask.safetensors"
BITS, VALUES = ".bits", ".values"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what is written in the place of tensors, and their shapes as the file's metadata.

    A tensor becomes NAME.bits, where it is not zero (a zero with a sign is not), and NAME.values, if that is smaller.
    """
    kept: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        there = tensor.view(_INTEGERS[tensor.element_size()]) != 0
        count = int(there.sum())
        if -(-tensor.numel() // 8) + count * tensor.element_size() < tensor.numel() * tensor.element_size():
            kept[name + BITS], kept[name + VALUES] = to_bits(there.flatten()), tensor[there]
            shapes[name] = list(tensor.shape)
        else:
            kept[name] = tensor
    return kept, {"format": "pt", "bitmask": json.dumps(shapes)}


def expand(kept: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors that `compress` was given, bit for bit. Raises ValueError where the two parts do not fit."""
    tensors = {name: tensor for name, tensor in kept.items() if not name.endswith((BITS, VALUES))}
    for name, shape in json.loads(metadata["bitmask"]).items():
        values, count = kept[name + VALUES], math.prod(shape)
        there = from_bits(kept[name + BITS], count)
        if len(there) != count or int(there.sum()) != len(values):
            raise ValueError(f"{name}: {len(values)} values for {int(there.sum())} places: the file is damaged")
        tensors[name] = torch.zeros(count, dtype=values.dtype).masked_scatter(there, values).view(shape)
    return tensors


def compress_folder(source: Path, folder: Path) -> None:
    """Write a model's folder with its weights compressed, file by file, and all else as it is.

    Raises ValueError where there are no weights in safetensors.
    """
    files = [file for file in source.glob("*.safetensors") if not file.name.endswith(SUFFIX)]
    if not files:
        raise ValueError(f"{source}: no weights to compress, there is no *.safetensors")
    for file in files:
        kept, metadata = compress(safetensors.torch.load_file(file))
        safetensors.torch.save_file(kept, folder / file.name.replace(".safetensors", SUFFIX), metadata)
    _copy_rest(source, folder, files)


def expand_folder(source: Path, folder: Path) -> None:
    """Write the plain folder that `compress_folder` was given. Raises ValueError where a folder is none of its own."""
    files = list(source.glob(f"*{SUFFIX}"))
    if not files:
        raise ValueError(f"{source}: nothing to expand, there is no *{SUFFIX}")
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = expand(safetensors.torch.load_file(file), metadata)
        safetensors.torch.save_file(tensors, folder / file.name.replace(SUFFIX, ".safetensors"), {"format": "pt"})
    _copy_rest(source, folder, files)


def _copy_rest(source: Path, folder: Path, written: list[Path]) -> None:
    for file in source.iterdir():
        if file.is_file() and file not in written:
            shutil.copy2(file, folder / file.name)
