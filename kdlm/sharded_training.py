"""ShardedTraining: one optimiser for all roles, whole under DDP, in shards under FSDP2 and DeepSpeed.

The Trainer's own optimiser, its groups tagged by role, and what a launch that asks for sharding must have come to.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from kdlm import deepspeed
from kdlm.methods import Method
from kdlm.models import tensor_parallel
from kdlm.networks import (
    Networks,
    clip_by_role,
    clipping_limits,
    counts_of,
    schedule_by_role,
    split_by_role,
    trainable_names,
)
from kdlm.sharding import refuse_pretence, require_shards, settle

Counts = dict[str, Tensor]
"""Of each unit, how many items an optimiser step has."""


class ShardedTraining(Trainer):
    """The part of a `DistillTrainer` that counts over the ranks, prepares networks for them, and steps those by role.

    Raises ValueError for a launch that would not do what was asked of it.
    """

    networks: Networks
    method: Method
    _active: frozenset[str] | None = None
    """Whose turn the current step is."""
    _zero: deepspeed.RoleSteps | None = None

    def __init__(self, *, args: TrainingArguments, **options: Any):
        # The Trainer refuses checkpoints of layers in slices, whose optimiser it cannot save. `RoleCheckpoints` does.
        weights_alone = args.save_only_model
        args.save_only_model = weights_alone or tensor_parallel(options["model"]) > 0
        super().__init__(args=args, **options)
        self.args.save_only_model = weights_alone
        refuse_pretence(self.accelerator)
        settle(self.accelerator)
        for average in self.networks.averages.values():
            average.to(self.args.device)  # FSDP2 moves what it shards, and the Trainer then nothing
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            deepspeed.settle(plugin, len(self.networks.role), limit=self.args.max_grad_norm)
        if self.method.runs_parts and self.is_fsdp_enabled:
            raise ValueError(
                f"training.fsdp: {type(self.method).__name__} runs parts of a layer by themselves, and FSDP2 gathers "
                "whole layers: use DeepSpeed or data parallelism"
            )
        if self.args.n_gpu > 1:
            raise ValueError("several GPUs in one process are not supported: start with torchrun or accelerate launch")
        self._trainable = trainable_names(self.networks)
        self._norms: dict[str, Tensor] = {}  # of each role's last gradient

    @property
    def data_ranks(self) -> int:
        """How many ranks read rows of their own: under tensor parallelism all read the same."""
        return 1 if tensor_parallel(self.networks.student) else self.accelerator.num_processes

    def _reduced(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum each value over the ranks, in one message."""
        if not values or self.data_ranks == 1:
            return values
        names = sorted(values)
        stacked = torch.stack([values[name].to(self.args.device, torch.float64) for name in names])
        return dict(zip(names, self.accelerator.reduce(stacked, reduction="sum"), strict=True))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Counts:
        """Count every unit over all micro-batches of the optimiser step and all ranks."""
        counted = [counts_of(self.method, batch) for batch in batch_samples]
        units = sorted(counted[0]) if counted else []
        if not units:
            return {}
        totals = torch.stack([torch.stack([c[unit].to(device) for c in counted]).sum() for unit in units])
        totals = totals if self.data_ranks == 1 else self.accelerator.reduce(totals, reduction="sum")
        return dict(zip(units, totals, strict=True))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimiser for all roles: the Trainer's own, its groups split and tagged by role."""
        fresh = self.optimizer is None
        optimizer: Any = super().create_optimizer(model)
        if fresh:
            optimizer.param_groups[:] = split_by_role(optimizer.param_groups, self.networks, self.method)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule; where roles take turns, each counts its own steps."""
        if not self.method.alternates or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = schedule_by_role(optimizer, self.method, self.args, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's, with what was asked to be sharded; DeepSpeed's engine steps by role and loads all of a run."""
        zero, resumed = self.is_deepspeed_enabled, resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if zero else resumed)
        if self.is_fsdp_enabled:
            require_shards(self.networks)
        if zero:
            several = len(self.networks.role) > 1 and self.args.max_grad_norm > 0
            limits = clipping_limits(self.networks, self.method, self.args.max_grad_norm) if several else {}
            self._zero = deepspeed.RoleSteps(self.model_wrapped, lambda: self._active or frozenset(), limits)
            self.accelerator.deepspeed_engine_wrapped = cast("Any", self._zero)
        if zero and resumed is not None:
            self._load_from_checkpoint(resumed)
            self._load_optimizer_and_scheduler(resumed)
        return prepared

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Begin with rank 0's copy of what tensor parallelism leaves whole; the ranks' gradients to it are the same."""
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                torch.distributed.broadcast(parameter.data, src=0)

    def _activate(self, index: int) -> frozenset[str]:
        active = self.method.active(index)
        if active != self._active:
            self.networks.activate(active, self._trainable)
            self._active = active
        return active

    def _backward_within(self, loss: Tensor) -> None:
        """Take the gradient of a part of a micro-batch's loss, after which others come."""
        if self._zero is not None:  # DeepSpeed would step here
            self._zero.backward(loss, sync_gradients=False)
        else:
            self.accelerator.backward(loss)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if len(self.networks.role) == 1:
            return super()._clip_grad_norm(model)
        if self._zero is not None:  # DeepSpeed has made its step by now
            norms = self._zero.norms
        else:
            self.accelerator.unscale_gradients()
            norms = clip_by_role(self.networks, self.method, self._active or frozenset(), self.args.max_grad_norm)
        self._norms |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        return torch.stack(list(norms.values())).norm()
