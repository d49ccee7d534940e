"""A tiny masked language model, and texts for it."""

from typing import Any

import torch
from transformers import EuroBertConfig, EuroBertForMaskedLM

from kdlm.signal import IGNORE_INDEX

VOCAB, MASK, END = 13, 12, 1


def tiny_masked(seed: int = 0, *, hidden: int = 16, layers: int = 1) -> Any:
    """A EuroBERT of a few thousand weights in float64; token 12 hides, token 1 ends."""
    torch.manual_seed(seed)
    config = EuroBertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
        mask_token_id=MASK,
    )
    return EuroBertForMaskedLM(config).double().eval()


def texts(lengths: list[int], given: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose first `given` tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(2, VOCAB - 1, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * given + ids[given:], "index": number})
    return made
