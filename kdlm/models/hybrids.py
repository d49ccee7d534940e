"""Attention layers become mixers whose cost is linear in length, inside an architecture that transformers knows.

Of Llama, Mistral and Qwen2 the hybrid is a Bamba: the layers that are kept beside Mamba-2 (arXiv 2405.21060). Of Qwen3,
whose attention has norms of queries and keys, it is a Qwen3.5 (text): the layers that are kept beside gated DeltaNet, a
linear attention (arXiv 2412.06464). Its attention has a gate that Qwen3 has not: sigmoid(0) = 1/2 with rows of zeros,
and an output projection of twice the size. A layer that is kept computes what it did.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]

MAMBA2, GATED_DELTA = ("llama", "mistral", "qwen2"), ("qwen3",)
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"),
)
"""What a configuration and its hybrid's call by one name."""
RENAMED = {"mlp": "feed_forward", "post_attention_layernorm": "pre_ff_layernorm", "norm": "final_layernorm"}
"""Modules of a Llama by their names in a Bamba."""
STEPS = (1e-3, 1e-1)
"""Mamba-2's range of time steps: the heads forget over some ten to a thousand tokens."""
GATE = 1.0
"""What opens Mamba-2's gate at first: equal for all channels, it is divided out again by the norm that follows."""


def hybrid_config(config: Any, layers: Sequence[int]) -> Any:
    """Return the configuration of the hybrid in which the attention of `layers` is replaced.

    Raises ValueError for a family without one, for layers that there are not, and for sizes that it cannot have.
    """
    kind, total = config.model_type, config.num_hidden_layers
    if kind not in (*MAMBA2, *GATED_DELTA):
        raise ValueError(f"student: layers of {', '.join((*MAMBA2, *GATED_DELTA))} can be replaced, not of {kind}")
    if len(set(layers)) < len(layers) or not all(0 <= layer < total for layer in layers):
        raise ValueError(f"student.layers: {list(layers)} must be distinct indices from 0 to {total - 1}")
    sliding = kind == "mistral" and config.sliding_window is not None
    if sliding or any(one != "full_attention" for one in getattr(config, "layer_types", None) or ()):
        raise ValueError(f"student: {kind} with a sliding window has no hybrid: set sliding_window: null in its config")
    shared = {name: getattr(config, name) for name in COPIED}
    shared["rope_parameters"] = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    shared["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (_qwen3_5 if kind in GATED_DELTA else _bamba)(config, frozenset(layers), shared)


def _bamba(config: Any, layers: frozenset[int], shared: dict[str, Any]) -> Any:
    from transformers import BambaConfig

    heads, width = config.num_attention_heads, shared["head_dim"]
    if heads * width % config.hidden_size:
        raise ValueError(
            f"student: {heads} heads of {width} are no multiple of the hidden size {config.hidden_size}, as Bamba's "
            "Mamba-2 has to have"
        )
    return BambaConfig(
        **shared,
        attention_bias=config.model_type == "qwen2" or getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        attn_layer_indices=[layer for layer in range(config.num_hidden_layers) if layer not in layers],
        mamba_n_heads=heads,
        mamba_n_groups=heads,
        mamba_d_head=width,
        mamba_d_state=width,
        mamba_expand=heads * width // config.hidden_size,
        mamba_proj_bias=True,
    )


def _qwen3_5(config: Any, layers: frozenset[int], shared: dict[str, Any]) -> Any:
    from transformers import Qwen3_5TextConfig

    heads, width = config.num_attention_heads, shared["head_dim"]
    kinds = ["linear_attention" if i in layers else "full_attention" for i in range(config.num_hidden_layers)]
    return Qwen3_5TextConfig(
        **shared,
        attention_bias=config.attention_bias,
        layer_types=kinds,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
    )


def replaced_layers(config: Any) -> list[int]:
    """Return the layers of a language model whose mixer is not attention, by its configuration."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]


@torch.no_grad()
def hybrid(model: Any, layers: Sequence[int], *, from_attention: bool = True, seed: int = 0) -> Any:
    """Return the hybrid of a model, which is left as it was.

    Args:
        model: a causal language model of a family above.
        layers: whose attention is replaced.
        from_attention: the mixers' projections are the attention's; else all of a mixer is as the hybrid's own
            initialisation has it, which is drawn with `seed`.
    """
    from transformers import AutoModelForCausalLM

    config = hybrid_config(model.config, layers)
    implementation = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=implementation)
    weights, own = dict(model.state_dict()), new.state_dict()
    mixers = {}
    make = delta_of_attention if model.config.model_type in GATED_DELTA else mamba2_of_attention
    for layer in layers:
        inside = f"model.layers.{layer}.self_attn."
        attention = {key.removeprefix(inside): weights.pop(key) for key in list(weights) if key.startswith(inside)}
        place = f"model.layers.{layer}.{'linear_attn' if make is delta_of_attention else 'mamba'}."
        blank = {key.removeprefix(place): value for key, value in own.items() if key.startswith(place)}
        if from_attention:
            mixers |= {place + key: value for key, value in (blank | make(attention, model.config)).items()}
    kept = _gated(weights) if make is delta_of_attention else {_renamed(key): value for key, value in weights.items()}
    if "q_proj.bias" in "".join(kept):  # Qwen2's output projection has no bias, Bamba's has one wherever queries do
        kept = {key: torch.zeros_like(own[key]) for key in own if key.endswith("o_proj.bias")} | kept
    new.load_state_dict(own | kept | mixers)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new


def mamba2_of_attention(attention: Weights, config: Any) -> Weights:
    """Return a Mamba-2 mixer's weights: C, B, x and the output are the attention's Q, K, V and O (arXiv 2408.15237).

    Every query head is a head and a group, so that keys and values of grouped attention are repeated. What attention
    has not starts as an identity: a convolution of the present token, a gate open for all channels, no dependence of
    the time step on the text, and no path around the state (D = 0, Mamba-2's own is 1).
    """
    heads = config.num_attention_heads
    q, k, v = (_by_head(attention, name, heads, config) for name in "qkv")
    gate, steps = torch.zeros_like(q), q.new_zeros(heads, q.shape[1])
    bias = _biases(attention, heads, config, q)
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
        **_memory(heads, q),
    }


def delta_of_attention(attention: Weights, config: Any) -> Weights:
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


def _renamed(key: str) -> str:
    return ".".join(RENAMED.get(part, part) for part in key.split("."))


def _gated(weights: Weights) -> Weights:
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
