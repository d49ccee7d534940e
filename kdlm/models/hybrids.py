"""Attention layers become mixers whose cost is linear in length, inside an architecture that transformers knows.

Of Llama, Mistral and Qwen2 the hybrid is a Bamba: the layers that are kept beside Mamba-2 (arXiv 2405.21060). Of Qwen3,
whose attention has norms of queries and keys, it is a Qwen3.5 (text): the layers that are kept beside gated DeltaNet, a
linear attention (arXiv 2412.06464). Its attention has a gate that Qwen3 has not: sigmoid(0) = 1/2 with rows of zeros,
and an output projection of twice the size. A layer that is kept computes what it did.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kdlm.models.mixer_weights import delta_of_attention, gated, mamba2_of_attention, renamed

MAMBA2, GATED_DELTA = ("llama", "mistral", "qwen2"), ("qwen3",)
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"),
)
"""What a configuration and its hybrid's call by one name."""


def hybrid_config(config: Any, layers: Sequence[int]) -> Any:
    """Return the configuration of the hybrid in which the attention of `layers` is replaced.

    Raises ValueError for a family without one, for layers that there are not, and for sizes that it cannot have.
    """
    kind, total = config.model_type, config.num_hidden_layers
    if kind not in (*MAMBA2, *GATED_DELTA):
        raise ValueError(f"student: layers of {', '.join((*MAMBA2, *GATED_DELTA))} can be replaced, not of {kind}")
    if getattr(config, "adaptive", None):
        raise ValueError("student.source: its layers are adaptive: take the model they were made of")
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
            mixers |= {
                place + key: value
                for key, value in (
                    blank | make(attention, model.config, weights[f"model.layers.{layer}.input_layernorm.weight"])
                ).items()
            }
    kept = gated(weights) if make is delta_of_attention else {renamed(key): value for key, value in weights.items()}
    if "q_proj.bias" in "".join(kept):  # Qwen2's output projection has no bias, Bamba's has one wherever queries do
        kept = {key: torch.zeros_like(own[key]) for key in own if key.endswith("o_proj.bias")} | kept
    new.load_state_dict(own | kept | mixers)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new
