"""Tiny language models and rows for tests of the trainer."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 61


def tiny_model(seed: int, *, hidden: int = 16, layers: int = 2, vocab: int = VOCAB, **options: Any) -> LlamaForCausalLM:
    """A Llama of a few thousand weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
        **options,
    )
    return LlamaForCausalLM(config)


def rows(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Token rows of these lengths; about a third of the labels are not trained on."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "length": length})
    return made
