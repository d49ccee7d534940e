"""The head of a checkpoint, read without the rest of the model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kdlm.models.loading import Pretrained, Sandbox
from kdlm.models.prediction import head
from kdlm.signal import Head

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_head(source: Pretrained | Sandbox) -> Head:
    """Return the head of a model whose body runs elsewhere (vLLM), on the CPU, in the dtype that the source asks for.

    Raises ValueError where the checkpoint has no safetensors, or keeps its head under a name that is not known.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import cached_file

    location, revision = source.location(), getattr(source, "revision", None)

    def file(name: str) -> Path | None:
        found = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    with torch.device("meta"):  # shapes and names, no weights
        model = AutoModelForCausalLM.from_config(source.config(), trust_remote_code=source.trust_remote_code)
    described = head(model)
    weight = _read(file, _names(model, described.weight), location)
    bias = None if described.bias is None else _read(file, _names(model, described.bias), location)
    if source.dtype != "auto":
        dtype = getattr(torch, source.dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return replace(described, weight=weight, bias=bias)


def _names(model: Any, wanted: torch.Tensor) -> list[str]:
    """Return every name that a parameter has: a tied head is stored as the embedding."""
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is wanted]


def _read(file: Callable[[str], Path | None], names: list[str], location: str) -> torch.Tensor:
    index = file(INDEX)
    places = json.loads(index.read_text())["weight_map"] if index is not None else {}
    for name in names:
        path = file(places.get(name, SINGLE)) if name in places or index is None else None
        if path is None:
            continue
        with safe_open(path, framework="pt") as opened:
            if name in opened.keys():
                return opened.get_tensor(name)
    raise ValueError(f"{location}: no safetensors file of it has {' or '.join(names)}, its head")
