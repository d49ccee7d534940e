"""FrozenCopy: averages and snapshots of a network in training, with the adapters that it trains merged into them."""

import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdlm import deepspeed

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

logger = logging.getLogger(__name__)

QUANTISED = ("Params4bit", "Int8Params")
"""Weights of bitsandbytes, by the names of their classes: what is not installed cannot be asked for."""


class FrozenCopy:
    """A copy of a network in float32 and evaluation mode, which moves towards it where the network trains.

    Of a network with LoRA or DoRA adapters it is the plain network of the merged weights: an average is one of
    W + scale * B A and not of the factors, whose size and orientation mean nothing (A -> c A, B -> B / c changes no
    answer, but the average of factors). A move merges one module at a time, and only what trains is read again. A base
    that is quantised is held in float32 too, dequantised once; to move, each of its weights is dequantised for itself.

    Args:
        source: the network, its parameters' `requires_grad` as they train; or another copy, to follow that.

    Raises ValueError for adapters and quantised weights of which no plain weights can be made.
    """

    module: nn.Module

    def __init__(self, source: "nn.Module | FrozenCopy"):
        self.reads: dict[str, Callable[[], Tensor]]
        self.buffers: list[tuple[nn.Module, nn.Module, str]]
        if isinstance(source, FrozenCopy):
            self.module = copy.deepcopy(source.module)
            layers = list(_side_by_side(self.module, source.module))
            self.reads = {name: partial(_parameter, source.module, name) for name in source.reads}
        else:
            trained = {id(parameter) for parameter in source.parameters() if parameter.requires_grad}
            self.module = _plain(source)
            layers = list(_side_by_side(self.module, inside(source)))
            self.reads = dict(_what_trains(layers, trained))
        self.buffers = [
            (ours, bare(theirs), name) for _, ours, theirs in layers for name, _ in ours.named_buffers(recurse=False)
        ]
        self.module.float().eval().requires_grad_(False)

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Become `decay * self + (1 - decay) * network`; at 0 the network as it is. Sharded, all ranks must call it."""
        for name, target in self.module.named_parameters():
            if name in self.reads:
                now = self.reads[name]().to(target)
                target.lerp_(now, 1 - decay) if decay else target.copy_(now)
        for ours, theirs, name in self.buffers:
            getattr(ours, name).copy_(getattr(theirs, name))


def whole(value: Tensor) -> Tensor:
    """Return a tensor that FSDP2 or ZeRO-3 has sharded as each rank's own copy of all of it; every rank must ask."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    return deepspeed.copied(value) if hasattr(value, "ds_id") else value


def inside(network: Any) -> nn.Module:
    """Return the network below a PEFT wrapper, with its adapters in it."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def bare(module: Any) -> Any:
    """Return what a layer of PEFT wraps: the layer below an adapter, or the copy that trains in its place."""
    if hasattr(module, "base_layer"):
        return module.get_base_layer()
    return module.modules_to_save[module.active_adapters[0]] if hasattr(module, "modules_to_save") else module


def _parameter(module: nn.Module, name: str) -> Tensor:
    return whole(module.get_parameter(name).detach())


def _plain(source: nn.Module) -> nn.Module:
    """Return a deep copy without adapters, dequantised; merged weights are made of their own, so none stays tied."""
    if getattr(getattr(source, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "an average or snapshot of a student that trains prompts has no weights of its own: train LoRA or DoRA"
        )
    for name, module in source.named_modules():
        _refuse(name, module)
    plain: Any = copy.deepcopy(inside(source))
    _unwrap(plain, inside(source))
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    if (quantizer := getattr(plain, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(plain)
        plain.is_loaded_in_4bit = plain.is_loaded_in_8bit = False
        size = 4 * sum(parameter.numel() for parameter in plain.parameters())
        logger.warning("the copy of a student with quantised weights is kept in float32: %.1f GiB", size / 2**30)
    if getattr(getattr(plain, "config", None), "tie_word_embeddings", False) and _untied(plain):
        plain.config.tie_word_embeddings = False
    return plain


def _refuse(name: str, module: Any) -> None:
    """Raise ValueError where a layer has no plain weight."""
    cannot = f"an average or snapshot of this student cannot be made: {name} "
    if hasattr(module, "base_layer"):
        from peft.tuners.lora import LoraLayer

        variants = {type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()}
        plain = isinstance(module, LoraLayer) and isinstance(getattr(bare(module), "weight", None), Tensor)
        if not plain or not all(variant.startswith("Dora") for variant in variants):
            raise ValueError(
                f"{cannot}is adapted by {type(module).__name__}; LoRA and DoRA of one weight can be merged"
            )
        if len(module.active_adapters) != 1 or any(module.lora_bias.values()) or module.merged:
            raise ValueError(f"{cannot}has several adapters, one with a bias, or one that is merged already")
    elif any(hasattr(module, mark) for mark in ("qweight", "W_q")):
        raise ValueError(f"{cannot}is quantised, and only weights of bitsandbytes can be dequantised here")


def _unwrap(plain: nn.Module, source: nn.Module) -> None:
    """Replace each layer of PEFT and of bitsandbytes by a plain one, with the weight that it has now."""
    for name, child in list(plain.named_children()):
        theirs, layer = getattr(source, name), bare(child)
        if type(getattr(layer, "weight", None)).__name__ in QUANTISED:
            bias = layer.bias
            layer = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
            layer.weight, layer.bias = nn.Parameter(_weight(theirs)), bias
        elif hasattr(child, "base_layer"):
            layer.weight = nn.Parameter(_weight(theirs))
        if layer is not child:
            setattr(plain, name, layer)
        _unwrap(layer, bare(theirs))


def _side_by_side(plain: nn.Module, source: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the modules of a copy by their names, each with its counterpart in what was copied."""
    yield name, plain, source
    below = bare(source)
    for child, module in plain.named_children():
        yield from _side_by_side(module, getattr(below, child), f"{name}.{child}" if name else child)


def _what_trains(
    layers: list[tuple[str, nn.Module, nn.Module]], trained: set[int]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield parameters of the copy, each with how it is read; modules are kept, as FSDP puts new parameters in them."""
    for name, plain, source in layers:
        for key, _ in plain.named_parameters(recurse=False):
            path, below = f"{name}.{key}" if name else key, bare(source)
            adapted = key == "weight" and hasattr(source, "base_layer")
            if adapted and any(id(parameter) in trained for parameter in source.parameters()):
                yield path, partial(_weight, source)
            elif not adapted and id(getattr(below, key)) in trained:
                yield path, partial(_parameter, below, key)


@torch.no_grad()
def _weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer in float32, dequantised and with its adapter merged.

    LoRA: W + scale B A (arXiv 2106.09685); DoRA: m (W + scale B A) / |W + scale B A|, the norm over each output's
    inputs (arXiv 2402.09353, equation 5).
    """
    from peft.utils.integrations import dequantize_module_weight

    base = bare(layer)
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        base.state_dict()  # evaluation on a CPU reorders 4-bit weights, which only saving knows to put back
    weight = whole(dequantize_module_weight(base).detach()).float().clone()
    if not hasattr(layer, "base_layer"):
        return weight
    lora: LoraLayer = layer  # pyright: ignore[reportAssignmentType]  _refuse has seen to it
    adapter = lora.active_adapters[0]
    weight += whole(lora.get_delta_weight(adapter)).to(weight)
    if adapter not in lora.lora_variant:
        return weight
    dora: Any = lora.lora_magnitude_vector[adapter]
    inputs = [dim for dim in range(weight.ndim) if dim != int(dora.fan_in_fan_out)]
    norm = torch.linalg.vector_norm(weight, dim=inputs, keepdim=True)
    return weight * (whole(dora.weight).view_as(norm).to(norm) / norm)


def _untied(model: Any) -> bool:
    before, after = model.get_input_embeddings(), model.get_output_embeddings()
    return after is not None and before.weight is not after.weight
