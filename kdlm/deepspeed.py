"""DeepSpeed's ZeRO: what transformers' and accelerate's support of it leaves open where several roles train.

ZeRO-1 shares out the optimiser's state among the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights as well
(arXiv 1910.02054). DeepSpeed steps inside `accelerator.backward`, clips all networks to one norm and steps every
parameter at every step; here a step has its boundary, its norms and its turns by role, as without DeepSpeed.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

Active = Callable[[], frozenset[str]]
"""Gives the roles whose turn the current step is."""


def refuse(args: Any, roles: int) -> None:
    """Raise ValueError, before a run, for what DeepSpeed would do otherwise than it was asked.

    Args:
        args: the TrainingArguments; with a `deepspeed_plugin` where a recipe or accelerate's launcher asks for it.
        roles: how many networks train.
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
    offloads = config.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
    if roles > 1 and args.max_grad_norm > 0 and offloads:
        raise ValueError(
            "DeepSpeed: with offload_optimizer it clips all networks to one norm, and this method trains several, each "
            "with its own: set training.max_grad_norm: 0, or leave offload_optimizer out"
        )


def settle(plugin: Any, roles: int) -> None:
    """Complete DeepSpeed's configuration: who clips, and that ZeRO-3 gives out whole weights to save."""
    config = plugin.hf_ds_config.config
    config["gradient_clipping"] = 0.0 if roles > 1 else config.get("gradient_clipping", "auto")
    if plugin.hf_ds_config.is_zero3():
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


class RoleSteps(DeepSpeedEngineWrapper):
    """Runs backward passes and steps of an engine whose parameter groups are tagged `role`.

    Args:
        engine: DeepSpeed's, around the parent of all roles.
        active: whose turn it is.
        limits: what each role's gradient is clipped to; empty where DeepSpeed clips, or nobody.
    """

    def __init__(self, engine: Any, active: Active, limits: Mapping[str, float]):
        super().__init__(engine)
        self.active, self.limits = active, limits
        self.norms: dict[str, Tensor] = {}
        engine.optimizer.optimizer.register_step_pre_hook(self._hold)

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """Take a gradient, of the same count as without DeepSpeed; at a boundary clip it and step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not sync_gradients:
            return
        optimizer = self.engine.optimizer
        self.norms = clip_by_role(optimizer, self.active(), self.limits) if self.limits else {}
        self.engine.step()
        if (gradients := getattr(optimizer, "grad_partitions_flat_buffer", None)) is not None:
            gradients.zero_()  # ZeRO-3 would hand a parameter that gets no gradient the one of an earlier step

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
    squares = torch.stack([sum((x.float().square().sum() for x in of), torch.zeros(())) for of in shares.values()])
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
def gathered(module: nn.Module) -> Iterator[None]:
    """Have every weight of a network that ZeRO-3 partitions whole on every rank; all must ask. It is to be read only.

    Raises nothing where nothing is partitioned.
    """
    partitioned = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def load(engine: Any, folder: Path) -> None:
    """Load weights and optimiser state that as many ranks or others have saved; each rank must ask.

    DeepSpeed's own files are for the number of ranks that wrote them: for another one rank 0 turns them into its
    universal checkpoint, beside the run's checkpoints and for as long as the ranks read it.
    """
    step = (folder / "latest").read_text().strip()
    wrote = len(list((folder / step).glob("*_optim_states.pt")))
    if wrote == dist.get_world_size():
        engine.load_checkpoint(str(folder))
        return
    between = folder.parent / f".universal-{step}"
    if dist.get_rank() == 0:
        _to_universal(folder / step, between / step)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(between))
    engine._config.load_universal_checkpoint = False
    dist.barrier()


def _to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    ds_to_universal.main(
        SimpleNamespace(input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options)
    )
