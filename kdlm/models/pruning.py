"""Depth- and width-pruned initialisation of a student from a larger model (Llama, Mistral, Qwen2, Qwen3, and mixtures
of experts: Qwen3-MoE, Mixtral, OLMoE, Phi-MoE).

Layers are copied whole. Width is cut by importance measured on the weights alone (no data): residual channels by
the energy they carry through embeddings and norms, feed-forward neurons by the product of what comes in and goes out,
attention heads by what they write. All experts and the router stay; of every expert the same number of neurons is kept,
by scores that are handed in (`kdlm.models.calibration`). It is a start for distillation, not a finished model.
"""

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdlm.models.pruned import Width

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe", "phimoe")

# The axes of each weight, by the last part of its name.
AXES = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("neuron", "hidden"),
    "up_proj": ("neuron", "hidden"),
    "down_proj": ("hidden", "neuron"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "norm": ("hidden",),
    "gate": ("expert", "hidden"),
    "router": ("expert", "hidden"),
    "experts.gate_up_proj": ("expert", "neuron of expert", "hidden"),
    "experts.down_proj": ("expert", "hidden", "neuron of expert"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
}


def kept_layers(layers: int | list[int] | None, total: int) -> list[int]:
    """Return the indices of the layers to keep. Raises ValueError when they are out of range or repeated."""
    if layers is None:
        return list(range(total))
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"student.layers: {layers} is not between 1 and the source's {total} layers")
        return [0] if layers == 1 else [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < total for i in layers):
        raise ValueError(f"student.layers: {layers} must be distinct indices from 0 to {total - 1}")
    return list(layers)


def pruned_config(config: Any, layers: int | list[int] | None, width: "Width") -> tuple[Any, list[int]]:
    """Return the student's configuration and the kept layers. Raises ValueError where a size cannot be had."""
    if config.model_type not in SUPPORTED:
        raise ValueError(f"student: pruning knows {', '.join(SUPPORTED)}, not {config.model_type}")
    if getattr(config, "adaptive", None):
        raise ValueError("student.source: its layers are adaptive, and cannot be cut: take the model they were made of")
    new, keep = copy.deepcopy(config), kept_layers(layers, config.num_hidden_layers)
    new.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        new.layer_types = [config.layer_types[i] for i in keep]
    if hasattr(config, "decoder_sparse_step"):
        dense = [place for place, layer in enumerate(keep) if not _has_experts(config, layer)]
        new.decoder_sparse_step, new.mlp_only_layers = 1, dense
    sizes = width.model_dump(exclude_none=True)
    if config.model_type == "olmoe" and sizes.keys() - {"intermediate_size"}:
        raise ValueError(
            "student.width: OLMoE's norms span all heads: of its widths, only intermediate_size can be cut"
        )
    for key, size in sizes.items():
        if getattr(config, key, None) is None:
            raise ValueError(
                f"student.width.{key}: {config.model_type} has no such size: experts are intermediate_size"
            )
        if size > getattr(config, key):
            raise ValueError(f"student.width.{key}: {size} is larger than the source's {getattr(config, key)}")
        setattr(new, key, size)
    key = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    if key in sizes and hasattr(config, "num_experts_per_tok") and expert_size(new) % 8:
        raise ValueError(f"student.width.{key}: {sizes[key]} neurons of an expert: its kernels take multiples of 8")
    if new.num_attention_heads % new.num_key_value_heads:
        raise ValueError(
            f"student.width: {new.num_attention_heads} query heads do not divide into {new.num_key_value_heads} groups"
        )
    new.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return new, keep


def expert_size(config: Any) -> int:
    """Return how many neurons an expert has."""
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def without_block(distances: Float[Tensor, "blocks"], drop: int) -> list[int]:
    """Return the layers that are left where the first block of `drop` layers with the least distance goes."""
    first, total = int(distances.argmin()), len(distances) + drop - 1
    return [layer for layer in range(total) if not first <= layer < first + drop]


def prune(
    model: "PreTrainedModel",
    layers: int | list[int] | None,
    width: "Width",
    experts: dict[str, Float[Tensor, "experts neurons"]] | None = None,
) -> "PreTrainedModel":
    """Return a smaller model of the same family made of the strongest parts of `model`, which is left as it is.

    Args:
        model: the source.
        layers: as `kept_layers` takes them.
        width: sizes to cut to.
        experts: by the name of a module of experts, how much each neuron matters; an expert without a score above 0
            (none was given, or no token was routed to it) is cut by its weights.
    """
    config, keep = pruned_config(model.config, layers, width)
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    hidden = _strongest(_channel_energy(weights), config.hidden_size)
    pruned = {}
    for name, tensor in weights.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        if match and int(match[1]) not in keep:
            continue
        axes = {"hidden": hidden}
        if match:
            prefix = name[: match.end()]
            axes |= _layer_axes(weights, prefix, model.config, config)
            axes |= _expert_axes(weights, f"{prefix}mlp.experts", config, experts or {})
            name = f"{name[: match.start(1)]}{keep.index(int(match[1]))}{name[match.end(1) :]}"
        pruned[name] = _cut(name, tensor, axes)
    student = type(model)._from_config(config, dtype=model.dtype)
    student.load_state_dict(pruned, strict=not config.tie_word_embeddings)
    student.tie_weights()
    return student


def _cut(name: str, tensor: Tensor, axes: dict[str, Tensor]) -> Tensor:
    module, kind = name.split(".")[-2:]
    names = AXES[f"experts.{kind}" if module == "experts" else module]
    for dim, axis in enumerate(names[:1] if kind == "bias" else names):
        if axis not in axes:
            continue
        if axis == "neuron of expert":
            tensor = _of_experts(tensor, dim, axes[axis])
        else:
            tensor = tensor.index_select(dim, axes[axis])
    return tensor.clone()


def _of_experts(tensor: Tensor, dim: int, kept: Int[Tensor, "experts kept"]) -> Tensor:
    """Take the kept neurons of each expert; rows of `gate_up_proj` (dim 1) are all gates, then all ups."""
    if dim == 2:
        return tensor.gather(2, kept[:, None].expand(-1, tensor.shape[1], -1))
    both = torch.cat([kept, kept + tensor.shape[1] // 2], 1)
    return tensor.gather(1, both[:, :, None].expand(-1, -1, tensor.shape[2]))


def _strongest(importance: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest values, in their own order, so that nothing is permuted."""
    return importance.topk(count).indices.sort().values


def _channel_energy(weights: dict[str, Tensor]) -> Tensor:
    """Energy of each residual channel: what the embedding and every layer write into it."""
    writers = [t.float() for n, t in weights.items() if n.endswith(("o_proj.weight", "down_proj.weight"))]
    writers += [t.float().transpose(0, 1).flatten(1) for n, t in weights.items() if n.endswith("experts.down_proj")]
    embedding = next(t.float() for n, t in weights.items() if n.endswith("embed_tokens.weight"))
    return embedding.square().mean(0) + sum(w.square().mean(1) for w in writers)


def _has_experts(config: Any, layer: int) -> bool:
    """Whether a layer of Qwen3-MoE has experts; the others have a dense feed-forward layer."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _expert_axes(
    weights: dict[str, Tensor], name: str, config: Any, scores: dict[str, Float[Tensor, "experts neurons"]]
) -> dict[str, Tensor]:
    """Return the kept neurons of every expert of a layer, if it has some."""
    if f"{name}.down_proj" not in weights:
        return {}
    down, up = weights[f"{name}.down_proj"].float(), weights[f"{name}.gate_up_proj"].float()
    importance = down.norm(dim=1) * up[:, up.shape[1] // 2 :].norm(dim=2)
    if name in scores:
        measured = scores[name].to(importance)
        importance = torch.where((measured > 0).any(1, keepdim=True), measured, importance)
    return {"neuron of expert": importance.topk(expert_size(config), dim=1).indices.sort(1).values}


def _layer_axes(weights: dict[str, Tensor], prefix: str, source: Any, target: Any) -> dict[str, Tensor]:
    """Return the kept neurons, query rows and key rows of one layer."""
    head_dim, heads, groups = target.head_dim, source.num_attention_heads, source.num_key_value_heads
    neurons = {}
    if f"{prefix}mlp.down_proj.weight" in weights:
        down, up = weights[f"{prefix}mlp.down_proj.weight"].float(), weights[f"{prefix}mlp.up_proj.weight"].float()
        neurons = {"neuron": _strongest(down.norm(dim=0) * up.norm(dim=1), target.intermediate_size)}
    written = weights[f"{prefix}self_attn.o_proj.weight"].float()
    by_head = written.reshape(written.shape[0], heads, head_dim).square().sum((0, 2)).reshape(groups, heads // groups)
    kept_groups = _strongest(by_head.sum(1), target.num_key_value_heads)
    per_group = target.num_attention_heads // target.num_key_value_heads
    if per_group > heads // groups:
        raise ValueError(f"student.width: {per_group} query heads a group, but the source has {heads // groups}")
    kept_heads = torch.cat([g * (heads // groups) + _strongest(by_head[g], per_group) for g in kept_groups])
    return {**neurons, "query": _rows(kept_heads, head_dim), "key": _rows(kept_groups, head_dim)}


def _rows(heads: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a projection that belong to these heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
