"""Weights of mixers that begin as an attention, and those of kept layers as the hybrid's architecture has them."""

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Of one attention, by their names in it; of a mixer, likewise; of a model."""

RENAMED = {"mlp": "feed_forward", "post_attention_layernorm": "pre_ff_layernorm", "norm": "final_layernorm"}
"""Modules of a Llama by their names in a Bamba."""
STEPS = (1e-2, 1.0)
"""Time steps of the first and the last head: with A = 1 they forget over some hundred tokens to one."""
GATE = 1.0
"""What opens Mamba-2's gate at first: equal for all channels, it is divided out again by the norm that follows."""


def mamba2_of_attention(attention: Weights, config: Any, norm: Tensor) -> Weights:
    """Return a Mamba-2 mixer's weights: C, B, x and the output are the attention's Q, K, V and O (arXiv 2408.15237).

    Every query head is a head and a group, so that keys and values of grouped attention are repeated. What attention
    has not starts as an identity: a convolution of the present token, a gate open for all channels, no dependence of
    the time step on the text, and no path around the state (D = 0, Mamba-2's own is 1). What a head writes is
    normalised, and begins with the size of the head's values, by their weights and those of the `norm` before them.
    """
    heads = config.num_attention_heads
    q, k, v = (_by_head(attention, name, heads, config) for name in "qkv")
    gate, steps = torch.zeros_like(q), q.new_zeros(heads, q.shape[1])
    width, bias = len(q) // heads, _biases(attention, heads, config, q)
    bias = torch.cat([q.new_full((len(q),), GATE), bias["v"], bias["k"], bias["q"], q.new_zeros(heads)])
    out = attention["o_proj.weight"]
    return {
        "in_proj.weight": torch.cat([gate, v, k, q, steps]),
        "in_proj.bias": bias,
        "out_proj.weight": out,
        "out_proj.bias": attention.get("o_proj.bias", out.new_zeros(len(out))),
        "conv1d.weight": _present(3 * len(q), 4, q),
        "conv1d.bias": q.new_zeros(3 * len(q)),
        "D": q.new_zeros(heads),
        "norm.weight": (v * norm).square().sum(1).unflatten(0, (heads, -1)).mean(1).sqrt().repeat_interleave(width),
        **_memory(heads, q),
    }


def delta_of_attention(attention: Weights, config: Any, norm: Tensor) -> Weights:
    """Return gated DeltaNet's weights: queries, keys, values and output are the attention's.

    The weights of Qwen3's norms of queries and keys are multiplied into their rows, as both are normalised again. The
    convolution is that of the present token, forgetting and writing do not depend on the text at first. The gate stays
    as the architecture draws it: it has no bias, and at zero nothing would reach queries, keys and values.
    """
    heads = config.num_attention_heads
    q, k, v = (_by_head(attention, name, heads, config) for name in "qkv")
    q, k = (w * attention[f"{name}_norm.weight"].repeat(heads)[:, None] for w, name in ((q, "q"), (k, "k")))
    if "q_proj.bias" in attention:
        raise ValueError("student: attention with biases has no place in gated DeltaNet, which has none")
    silent = q.new_zeros(heads, q.shape[1])
    return {
        "in_proj_qkv.weight": torch.cat([q, k, v]),
        "in_proj_a.weight": silent,
        "in_proj_b.weight": silent.clone(),
        "out_proj.weight": attention["o_proj.weight"],
        "conv1d.weight": _present(3 * len(q), 4, q),
        **_memory(heads, q),
    }


def _by_head(attention: Weights, name: str, heads: int, config: Any) -> Tensor:
    """Return a projection `[heads * width, hidden]` in which every query head has rows of its own."""
    weight = attention[f"{name}_proj.weight"]
    return _repeated(weight, name, heads, config)


def _repeated(rows: Tensor, name: str, heads: int, config: Any) -> Tensor:
    groups = heads if name == "q" else config.num_key_value_heads
    return rows.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)


def _biases(attention: Weights, heads: int, config: Any, like: Tensor) -> Weights:
    zeros = like.new_zeros(len(like))
    found = {name: attention.get(f"{name}_proj.bias") for name in "qkv"}
    return {name: zeros if b is None else _repeated(b, name, heads, config) for name, b in found.items()}


def _present(channels: int, taps: int, like: Tensor) -> Tensor:
    """Return a convolution that gives back the token it stands at."""
    weight = like.new_zeros(channels, 1, taps)
    weight[:, :, -1] = 1
    return weight


def _memory(heads: int, like: Tensor) -> Weights:
    """Return A = 1, and time steps from the shortest to the longest, one for each head."""
    low, high = (math.log(step) for step in STEPS)
    steps = torch.linspace(low, high, heads, dtype=torch.float64).exp()
    return {"dt_bias": steps.expm1().log().to(like), "A_log": like.new_zeros(heads)}


def renamed(key: str) -> str:
    """Return what a weight of a Llama is called in a Bamba."""
    return ".".join(RENAMED.get(part, part) for part in key.split("."))


def gated(weights: Weights) -> Weights:
    """Return the weights of Qwen3 as Qwen3.5 has them: norms about 1, and a gate of 1/2 that is made up for."""
    new = {}
    for key, value in weights.items():
        if key.endswith("norm.weight"):
            value = value - 1
        elif ".q_proj." in key:
            width = weights[f"{key.rpartition('.q_proj.')[0]}.q_norm.weight"].shape[0]
            value = value.unflatten(0, (-1, width))
            value = torch.cat([value, torch.zeros_like(value)], 1).flatten(0, 1)
        elif ".o_proj.weight" in key:
            value = 2 * value
        new[key] = value
    return new
