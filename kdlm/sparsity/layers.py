"""Which weights of a model can be pruned, and how sparse they are."""

from typing import Any

import torch
from torch import Tensor, nn

from kdlm.sharding import own
from kdlm.sparsity.masks import Masks, follows
from kdlm.sparsity.section import SparsitySection

ABOUT = "sparsity.json"
"""What a folder with a sparse model says of it: `described_sparsity`."""
CLASS_HEADS = ("classifier", "score")
"""What transformers calls the head of a classifier, which is no output embedding."""


def prunable(model: nn.Module, section: SparsitySection, *, trains: bool = True) -> dict[str, nn.Linear]:
    """Return the linear layers that a section names, by their names: by default all but the head.

    Args:
        trains: whether their weights have to train; a method that takes turns may have left the student frozen.

    Raises ValueError where there is none, an entry of `modules` names none, or one cannot be pruned.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "sparsity: an adapter merged into a pruned weight fills its zeros: train the whole weights (leave "
            "student.lora out)"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    every = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and one is not head and name.split(".")[0] not in CLASS_HEADS
    }
    ends = section.modules
    chosen = {name: one for name, one in every.items() if not ends or any(_ends(name, end) for end in ends)}
    for end in ends:
        if not any(_ends(name, end) for name in every):
            raise ValueError(f"sparsity.modules: no linear layer's name ends in {end!r}; there are e.g. {_some(every)}")
    if not chosen:
        raise ValueError(f"sparsity: {type(model).__name__} has no linear layers but its head")
    for name, layer in chosen.items():
        if not layer.weight.is_floating_point() or (trains and not layer.weight.requires_grad):
            raise ValueError(f"sparsity: the weight of {name} is quantised or frozen: leave it out by sparsity.modules")
    return chosen


def magnitudes(layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Return |w| of each layer, of the rows that this rank holds."""
    return {name: own(layer.weight.detach()).abs() for name, layer in layers.items()}


@torch.no_grad()
def apply(layers: dict[str, nn.Linear], masks: Masks) -> None:
    """Set pruned weights to zero, in place."""
    for name, mask in masks.items():
        own(layers[name].weight).masked_fill_(mask, 0.0)


def described_sparsity(model: nn.Module, section: SparsitySection) -> dict[str, Any]:
    """Return what `sparsity.json` says: the pattern, and the share of zeros of each layer, of all, and of the model.

    Raises ValueError, naming the layer, where a model does not have the pattern of n:m.
    """
    layers = prunable(model, section, trains=False)
    zeros = {name: int((layer.weight == 0).sum()) for name, layer in layers.items()}
    if section.kept_of is not None:
        for name, layer in layers.items():
            if not follows(layer.weight, *section.kept_of):
                raise ValueError(f"sparsity.pattern: the weight of {name} is not {section.pattern}")
    pruned, every = sum(layer.weight.numel() for layer in layers.values()), sum(p.numel() for p in model.parameters())
    return {
        "pattern": section.pattern,
        "target": section.target,
        "share": sum(zeros.values()) / pruned,
        "share_of_model": sum(int((p == 0).sum()) for p in model.parameters()) / every,
        "weights": {"pruned": sum(zeros.values()), "of": pruned, "model": every},
        "layers": {name: zeros[name] / layer.weight.numel() for name, layer in layers.items()},
    }


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _some(layers: dict[str, nn.Linear]) -> str:
    return ", ".join(list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))[:4])
