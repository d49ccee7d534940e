"""Models in shards (FSDP2): a frozen teacher on its own, and what a launch that asks for sharding must have come to.

The student is sharded by accelerate, as the child of one parent module; the teacher here, with groups, hooks and a mesh
of its own, and without gradients or optimiser state. Its backbone is the root, because that is what is called, and its
head stands beside it: whoever reads the head gathers it, once for each answer.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kdlm import deepspeed
from kdlm.models.frozen_copies import whole
from kdlm.models.prediction import Predictor, backbone, decoder_layers, plain
from kdlm.signal import Head


def ranks() -> int:
    """Return how many processes run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sharded(load: Callable[..., Any], device: torch.device, *, offload: bool = False) -> Any:
    """Return a frozen language model of which each rank holds its share of every weight, and rank 0 ever held all.

    Rank 0 opens it in the host's memory and hands each weight round, one after the other; the others open its shape.

    Args:
        load: opens the model; takes `device_map`.
        device: where this rank computes.
        offload: keep the shards in the host's memory, from which a layer is fetched while it computes.

    Raises ValueError where there is one process, for a model whose logits are not `head(hidden)`, and where weights
    would be left over that nobody shards.
    """
    if ranks() == 1:
        raise ValueError("teacher.placement: sharded needs several ranks, and this is one process: use resident")
    if deepspeed.asked():
        model = load().eval().requires_grad_(False)
        _require_hidden(Predictor(model).reads_hidden)
        deepspeed.partition(backbone(model), plain(model).get_output_embeddings(), offload=offload)
        return model
    first = dist.get_rank() == 0
    model = (load() if first else load(device_map={"": "meta"})).eval().requires_grad_(False)
    reads_hidden = torch.tensor(not first or Predictor(model).reads_hidden, device=device)
    dist.broadcast(reads_hidden, 0)
    _require_hidden(bool(reads_hidden))
    weights, buffers = (model.state_dict(), dict(model.named_buffers())) if first else ({}, {})
    model.to("meta")
    model.tie_weights()
    _shard(model, device, offload)
    home = torch.device("cpu") if offload else device
    model.to_empty(device=home)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, weights, options=options)
    _hand_round(model, buffers, device)
    if left := [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]:
        raise ValueError(f"teacher.placement: sharded leaves {left[0]} whole on every rank, outside backbone and head")
    return model


def _require_hidden(reads_hidden: bool) -> None:
    if not reads_hidden:
        raise ValueError("teacher.placement: sharded reads hidden states, and this model's logits are not head(hidden)")


def _shard(model: Any, device: torch.device, offload: bool) -> None:
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    options: Any = {"mesh": mesh, "reshard_after_forward": True, "offload_policy": policy}
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    body, head = backbone(model), plain(model).get_output_embeddings()
    tied = head.weight is body.get_input_embeddings().weight
    fully_shard(body, **options)
    if tied:
        head.weight = body.get_input_embeddings().weight
    else:
        fully_shard(head, **options)


def _hand_round(model: nn.Module, buffers: dict[str, Tensor], device: torch.device) -> None:
    """Give every rank rank 0's buffers: what a model does not save is in no state dict."""
    for name, empty in list(model.named_buffers()):
        value = buffers[name].to(device) if buffers else torch.empty_like(empty, device=device)
        dist.broadcast(value.contiguous(), 0)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, value)


def gathered(head: Head) -> Head:
    """Return a head with all of its weights on this rank; every rank must ask."""
    weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
    return Head(weight, bias, head.logit_scale, head.softcap)


@contextmanager
def whole_on_every_rank(networks: nn.Module, *, reshard: bool = True) -> Iterator[None]:
    """Hold all weights of networks that FSDP2 has sharded on every rank, which may then run them at their own pace.

    For what ranks cannot do in step: drawing text of different lengths, handing weights to an engine. Every rank must
    come here. Nothing happens to networks that are not sharded.

    Args:
        reshard: whether layers give their weights up after a forward pass otherwise, as accelerate was told.
    """
    parts = [module for module in networks.modules() if isinstance(module, FSDPModule)]
    if parts:
        networks(lambda: None)  # FSDP2 knows its root from the first forward pass on
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshard and part is not parts[0], recurse=False)
            part.reshard()


def own(weight: Tensor) -> Tensor:
    """Return what this rank holds of a weight: its own numbers, not a copy of them."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def part_like(value: Tensor, weight: Tensor) -> Tensor:
    """Return of a tensor, which every rank has whole, what `own` returns of a weight of its shape."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None).to_local().clone()


def whole_like(part: Tensor, weight: Tensor) -> Tensor:
    """Return the whole of what each rank holds a part of, as it does of a weight; every rank must ask."""
    if not isinstance(weight, DTensor):
        return part
    layout = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, **layout).full_tensor()


def held(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Return how many elements of some weights this rank holds, and how many there are."""
    weights = list(tensors)
    return sum(own(weight).numel() for weight in weights), sum(weight.numel() for weight in weights)


def refuse_pretence(accelerator: Any) -> None:
    """Raise ValueError where FSDP was asked for, by a recipe or by accelerate's launcher, and nothing will be sharded.

    accelerate leaves its plugin out on CPUs, without a word: every rank would train whole networks, as under DDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if getattr(accelerator.state, "fsdp_plugin", None) is None:
        raise ValueError(
            f"training.fsdp: FSDP was asked for, and accelerate does not shard in {ranks()} process(es) on "
            f"{accelerator.device.type}: start ranks on GPUs, by torchrun or accelerate launch, or leave it "
            "out (torchrun on a CPU runs DDP)"
        )
    if not accelerator.is_fsdp2:
        raise ValueError("training.fsdp_config.version: 1 is not supported: leave it out, or set 2")
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "training.fsdp_config.cpu_ram_efficient_loading: kdlm looks at every network before it is sharded, and so "
            "needs its weights on every rank: leave it out, or set false"
        )


def settle(accelerator: Any) -> None:
    """Have FSDP2 leave what networks return as it is, and sum gradients in float32, under mixed precision too.

    accelerate casts both to bfloat16: a loss that is a sum over thousands of tokens would keep three of its digits, and
    so would the count that it is divided by.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def require_shards(networks: nn.Module) -> None:
    """Raise ValueError where ranks under FSDP2 hold whole networks after all."""
    here, everything = held(networks.parameters())
    if ranks() > 1 and here == everything:
        raise ValueError(f"training.fsdp: every rank holds all {everything} weights: nothing is sharded")
