"""DeepSpeed's ZeRO: what transformers' and accelerate's support of it leaves open where several roles train.

ZeRO-1 shares out the optimiser's state among the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights as well
(arXiv 1910.02054). DeepSpeed steps inside `accelerator.backward`, clips all networks to one norm and steps every
parameter at every step; here a step has its boundary, its norms and its turns by role, as without DeepSpeed.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Active = Callable[[], frozenset[str]]
"""Gives the roles whose turn the current step is."""


def refuse(args: Any, student: Any) -> None:
    """Raise ValueError, before a run, for what DeepSpeed would do otherwise than it was asked.

    Args:
        args: the TrainingArguments; with a `deepspeed_plugin` where a recipe or accelerate's launcher asks for it.
        student: as it was loaded.
    """
    config = args.deepspeed_plugin.hf_ds_config
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"DeepSpeed: {launched} processes were started (WORLD_SIZE), and this one believes in {args.world_size}: "
            "nothing would be partitioned, and each would train alone. On a CPU, say training.use_cpu: true"
        )
    if config.get_value("zero_optimization.stage", 0) not in (1, 2, 3):
        raise ValueError("DeepSpeed: without zero_optimization.stage 1, 2 or 3 nothing is partitioned: leave it out")
    for key in ("optimizer", "scheduler"):
        if key in config.config:
            raise ValueError(f"DeepSpeed: leave `{key}` out of its configuration: kdlm's own knows the roles")
    if isinstance(student, nn.Module) and partitioned(student):
        raise ValueError("DeepSpeed: the student is partitioned already: load it before the TrainingArguments are made")


def settle(plugin: Any, roles: int, *, limit: float = 0.0) -> None:
    """Complete DeepSpeed's configuration: who clips, and that ZeRO-3 gives out whole weights to save.

    Args:
        plugin: accelerate's.
        roles: how many networks train.
        limit: what gradients are clipped to, where the configuration does not say it.

    Raises ValueError for gradients that nobody could clip as they are to be.
    """
    config = plugin.hf_ds_config.config
    clipping = config.setdefault("gradient_clipping", limit)
    offloads = plugin.hf_ds_config.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
    if roles > 1 and clipping and offloads:
        raise ValueError(
            "DeepSpeed: with offload_optimizer it clips all networks to one norm, and this method trains several, each "
            "with its own: set training.max_grad_norm: 0, or leave offload_optimizer out"
        )
    config["gradient_clipping"] = clipping if roles == 1 else 0.0
    if plugin.hf_ds_config.is_zero3():
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def cuts_weights(accelerator: Any) -> bool:
    """Whether a run is one of ZeRO-3."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.hf_ds_config.is_zero3()


class RoleSteps:
    """Runs an engine whose parameter groups are tagged `role`, in the place of accelerate's DeepSpeedEngineWrapper.

    Args:
        engine: DeepSpeed's, around the parent of all roles.
        active: whose turn it is.
        limits: what each role's gradient is clipped to; empty where DeepSpeed clips, or nobody.
    """

    def __init__(self, engine: Any, active: Active, limits: Mapping[str, float]):
        require_partitions(engine)
        self.engine = engine
        self.active, self.limits = active, limits
        self.norms: dict[str, Tensor] = {}
        # Ranks that share sequences: ZeRO-1 and 2 add up their gradients, and average over groups of them; ZeRO-3
        # averages over all ranks, as long as it scatters what it reduces.
        self.summed = engine.sequence_parallel_size if engine.zero_optimization_stage() < 3 else 1
        engine.optimizer.optimizer.register_step_pre_hook(self._hold)

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """Take a gradient, of the same count as without DeepSpeed; at a boundary clip it and step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss / self.summed, scale_wrt_gas=False)
        if not sync_gradients:
            return
        optimizer = self.engine.optimizer
        self.norms = clip_by_role(optimizer, self.active(), self.limits) if self.limits else {}
        self.engine.step()
        if (gradients := getattr(optimizer, "grad_partitions_flat_buffer", None)) is not None:
            gradients.zero_()  # ZeRO-3 would hand a parameter that gets no gradient the one of an earlier step

    def get_global_grad_norm(self) -> float:
        """Return the norm of the last gradient that DeepSpeed clipped, as accelerate asks for it."""
        norm = self.engine.get_global_grad_norm()
        return norm.item() if isinstance(norm, Tensor) else norm

    def _hold(self, optimizer: Any, *_: Any) -> None:
        """Leave out the groups whose turn it is not: DeepSpeed has gradients of zero there, which move momentum."""
        for group in optimizer.param_groups:
            if group["role"] not in self.active():
                for parameter in group["params"]:
                    parameter.grad = None


@torch.no_grad()
def clip_by_role(optimizer: Any, active: frozenset[str], limits: Mapping[str, float]) -> dict[str, Tensor]:
    """Clip the gradient of each active role, in this rank's shares; return the norms before, over all ranks."""
    place = getattr(optimizer, "sub_group_to_group_id", None)  # ZeRO-3 cuts groups into pieces
    shares: dict[str, list[Tensor]] = {name: [] for name in sorted(active)}
    for number, gradients in optimizer.averaged_gradients.items():
        role = optimizer.param_groups[number if place is None else place[number]]["role"]
        if role in active:
            shares[role] += gradients
    nothing = torch.zeros((), device=optimizer.device)  # what a rank may have of a small role
    squares = torch.stack([sum((x.float().square().sum() for x in of), nothing) for of in shares.values()])
    dist.all_reduce(squares, group=optimizer.dp_process_group)
    norms = dict(zip(shares, squares.sqrt() / optimizer.loss_scale, strict=True))
    for name, gradients in shares.items():
        factor = (limits[name] / (norms[name] + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
    return norms


def require_partitions(engine: Any) -> None:
    """Raise ValueError where ranks were started and DeepSpeed shares nothing out among them."""
    launched, own = int(os.environ.get("WORLD_SIZE", "1")), dist.get_world_size(engine.data_parallel_group)
    if own != launched:
        raise ValueError(f"DeepSpeed partitions among {own} ranks, and {launched} were started")
    if engine.zero_optimization_stage() < 3:
        return
    held = sum(p.ds_tensor.numel() for p in engine.module.parameters())
    total = sum(p.ds_numel for p in engine.module.parameters())
    if held * own > total + own * len(list(engine.module.parameters())) * own:
        raise ValueError(f"DeepSpeed ZeRO-3 leaves {held} of {total} weights on one of {own} ranks")


@contextmanager
def sharing_attention(implementation: str) -> Iterator[None]:
    """Let accelerate have DeepSpeed share attention among ranks (Ulysses, arXiv 2309.14509) for as long as a run lasts.

    accelerate asks before DeepSpeed knows of the ranks; DeepSpeed keeps the groups of an earlier run, and what it puts
    in the place of an implementation is every model's of this process, and stays there.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.init_distributed()
    parallel_state_sp._release_sequence_parallel_groups()
    own = ALL_ATTENTION_FUNCTIONS[implementation]
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[implementation] = own


def asked() -> bool:
    """Whether this process trains under DeepSpeed: by its TrainingArguments, or by accelerate's launcher."""
    return _config() is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _config() -> Any:
    from transformers.integrations import deepspeed as integration

    weak = integration._hf_deepspeed_config_weak_ref
    return None if weak is None else weak()


@contextmanager
def loading_whole() -> Iterator[None]:
    """Have transformers load models as without DeepSpeed: under ZeRO-3 it would partition all of them, teachers too.

    A network is read before its engine is there, and is partitioned when that is made.
    """
    from transformers.integrations import deepspeed as integration

    config = _config()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def partition(body: nn.Module, head: nn.Module, *, offload: bool = False) -> None:
    """Let each rank keep its share of every weight of a frozen network: a ZeRO-3 module without optimiser.

    A layer is gathered while it computes and given up again; the head, which others read, is theirs to gather.

    Args:
        body: what is called; its hooks begin there.
        head: the output projection, which may share a weight with the body.
        offload: keep the shares in the host's memory.
    """
    import deepspeed

    kind = next(body.parameters()).dtype
    place = {"offload_param": {"device": "cpu"}} if offload else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # must be said, and is of no use here
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **place},
        "bf16": {"enabled": kind == torch.bfloat16},
        "fp16": {"enabled": kind == torch.float16},
    }
    deepspeed.initialize(model=body, config=config)
    if not all(hasattr(p, "ds_id") for p in head.parameters()):
        own: Any = {"remote_device": "cpu"} if offload else {}
        deepspeed.zero.Init(module=head, config_dict_or_path=config, dtype=kind, **own)


def partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 has shared out a network's weights, which answers to all ranks then or to none."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have every weight of a network that ZeRO-3 partitions whole on every rank, to be read; all ranks must ask."""
    if not partitioned(module):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def whole_weights(trainer: Any, role: str) -> dict[str, Tensor]:
    """Return a role's weights in the host's memory of rank 0; every rank must ask, after training."""
    prefix, state = f"role.{role}.", trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def copied(weight: Tensor) -> Tensor:
    """Return a copy of all of a weight that ZeRO-3 partitions; all ranks must ask."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def shape_of(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, also where this rank holds a share of it."""
    return getattr(weight, "ds_shape", weight.shape)


def of_its_own(weight: Tensor) -> Tensor:
    """Return a weight that is no piece of a larger buffer: DeepSpeed packs them together, and files take whole ones."""
    return weight if weight.untyped_storage().nbytes() == weight.nbytes else weight.clone()
