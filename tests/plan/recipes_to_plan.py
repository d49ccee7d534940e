"""Recipes around configurations that were made up: no weights, no tokenizer, nothing downloaded."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from kdlm.plan import Device
from kdlm.recipe import Recipe

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GPU = Device("made up", 10**9, half=1e12, single=1e11, bandwidth=1e11)
CPU = Device(
    "made up too", 10**12, half=1e11, single=1e11, bandwidth=1e10, kind="cpu", bf16=False, measured=True, apart=False
)


def folder(path: Path, **sizes: Any) -> str:
    """Write a configuration of a Llama."""
    config = LlamaConfig(**{"vocab_size": 1000, **SMALL, **sizes}, architectures=["LlamaForCausalLM"])
    config.save_pretrained(path)
    return str(path)


def recipe(path: Path, changes: dict[str, Any] | None = None, **sizes: Any) -> Recipe:
    """Return a recipe of logit distillation between two small models, with other values under some dotted keys."""
    data: dict[str, Any] = {
        "student": {"name": "fresh", "config_from": folder(path / "student", **sizes)},
        "teacher": {"name": "local", "path": folder(path / "teacher", hidden_size=96), "dtype": "float32"},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 64},
        "method": {"name": "logit_kd"},
        "losses": [{"name": "forward_kl"}],
        "training": {"max_steps": 100, "per_device_train_batch_size": 4},
        "run_dir": str(path / "run"),
    }
    for key, value in (changes or {}).items():
        where, _, name = key.rpartition(".")
        (data[where] if where else data)[name] = value
    return Recipe.model_validate(data)
