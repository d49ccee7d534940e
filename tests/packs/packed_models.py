"""Tiny models, tuned copies of them, and what a test wants to know of their folders."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 64}
Change = Callable[[str, Tensor], Tensor]


def small_model(family: str = "qwen3", *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Return a random model of a few thousand weights."""
    torch.manual_seed(seed)
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    return model(config(**SIZES, **HEADS, tie_word_embeddings=tied)).to(dtype)


def noise(name: str, weight: Tensor) -> Tensor:
    """A change of every weight, with some directions above the rest where there are directions."""
    scattered = 3e-3 * torch.randn_like(weight)
    if weight.ndim < 2:
        return scattered
    return scattered + 1e-2 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1])


def changed(model, change: Change = noise, seed: int = 1):
    """Add to every weight what `change` says, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += change(name, weight).to(weight.dtype)
    return model


def saved(model, folder: Path, shards: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def a_pair(root: Path, change: Change = noise, shards: str = "50GB", **options) -> tuple[Path, Path]:
    """Write a base and a tuned copy of it."""
    model = small_model(**options)
    base = saved(model, root / "base", shards)
    return base, saved(changed(model, change), root / "tuned")


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights as transformers opens them."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def distance(folder: Path, other: Path) -> float:
    """Return the largest difference of any two weights."""
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
