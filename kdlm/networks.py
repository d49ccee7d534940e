"""The networks of a run: one parent module for all that trains, and the averages that follow it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, TrainingArguments, get_scheduler

from kdlm.deepspeed import gathered, of_its_own
from kdlm.methods import Method, Terms
from kdlm.models import FrozenCopy, tensor_parallel, view, whole
from kdlm.roles import EmaOf, Role, SnapshotOf, Trainable

Answer = TypeVar("Answer")


class Networks(nn.Module):
    """Holds every trainable network by its role, and runs the method's step inside its own forward.

    One parent, because DDP, FSDP2 and DeepSpeed wrap a single module, and their hooks only see what happens inside
    its forward; the frozen teacher is no child of it. It stands in for the student where the Trainer asks about
    configuration and checkpointing.
    """

    copies: dict[str, FrozenCopy]
    averages: dict[str, nn.Module]
    followers: dict[str, EmaOf | SnapshotOf]
    views: dict[str, Any]

    accepts_loss_kwargs = True  # the Trainer then counts the items of a whole optimiser step and leaves scaling to us

    def __init__(self, student: nn.Module, method: Method, teacher: Any):
        super().__init__()
        reader, answering = view(student), getattr(teacher, "view", teacher)
        self.role = nn.ModuleDict({"student": student})
        for name, role in method.roles.items():
            if isinstance(role, Trainable) and role.make is not None:
                self.role[name] = role.make(reader, answering)
        # Averages are kept off the module tree: never wrapped, never given to the optimiser. A teacher may have some.
        own = teacher.roles_beside(student) if hasattr(teacher, "roles_beside") else {}
        roles: dict[str, Role] = {**method.roles, **own}
        followers = {name: role for name, role in roles.items() if not isinstance(role, Trainable)}
        copies: dict[str, FrozenCopy] = {}
        for name, role in followers.items():
            copies[name] = FrozenCopy(copies[role.role] if role.role in copies else self.role[role.role])
        averages = {name: one.module for name, one in copies.items()}
        self.own_steps = {name: own_steps(method, name) for name in self.role}
        object.__setattr__(self, "copies", copies)
        object.__setattr__(self, "averages", averages)
        object.__setattr__(self, "followers", followers)
        views = {name: reader if module is student else module for name, module in self.role.items()}
        read = {"student"}
        for name, role in followers.items():
            read |= {name} if role.role in read else set()
            views[name] = view(averages[name]) if name in read else averages[name]
        object.__setattr__(self, "views", views | ({} if teacher is None else {"teacher": answering}))
        if teacher is not None and hasattr(teacher, "follow"):
            teacher.follow(self.views)

    @property
    def student(self) -> Any:
        return self.role["student"]

    def module_of(self, name: str) -> Any:
        """Return the network of a role."""
        return self.averages[name] if name in self.averages else self.role[name]

    def forward(self, advance: Callable[[], Answer]) -> tuple[dict[str, Tensor], Answer]:
        """Run what asks the networks something; in shards they answer nowhere else.

        Returns the sums of terms by name, where wrappers find what goes backward, and the answer.
        """
        answer = advance()
        return {name: term.sum for name, term in answer.terms.items()} if isinstance(answer, Terms) else {}, answer

    def ask(self, advance: Callable[[], Answer]) -> Answer:
        """Run what asks the networks something and takes no gradient; what was gathered for it is given up again."""
        _, answer = self(advance)
        if isinstance(self, FSDPModule):
            self.reshard()
        return answer

    def activate(self, active: frozenset[str], trainable: dict[str, set[str]]) -> None:
        """Let gradients reach the active roles only."""
        for name, module in self.role.items():
            for key, parameter in module.named_parameters():
                if key in trainable[name]:
                    parameter.requires_grad_(name in active)

    def move_averages(self, active: frozenset[str], done: int) -> None:
        """Move each average towards its role, if that role moved in the last of `done` steps and it is its turn."""
        for name, role in self.followers.items():
            if isinstance(role, EmaOf) and role.role in active and self.own_steps[role.role](done) % role.every == 0:
                with gathered(self.role):
                    self.copies[name].move(role.decay)

    def take_snapshots(self, done: int | None = None) -> None:
        """Copy what a snapshot is taken of, after `done` optimiser steps, or at the end of an epoch (None)."""
        for name, role in self.followers.items():
            if isinstance(role, SnapshotOf) and (role.at is None if done is None else role.at and role.at(done)):
                with gathered(self.role):
                    self.copies[name].move(decay=0.0)

    def auxiliary(self) -> dict[str, nn.Module]:
        """Return what belongs into a checkpoint but not into the exported student."""
        return {**{name: module for name, module in self.role.items() if name != "student"}, **self.averages}

    def auxiliary_weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of `auxiliary`, gathered where they are sharded; every rank must ask."""
        weights = {}
        for name, module in self.auxiliary().items():
            with gathered(module):
                weights[name] = {key: of_its_own(whole(value)) for key, value in module.state_dict().items()}
        return weights

    def to(self, *args: Any, **kwargs: Any) -> "Networks":
        for average in self.averages.values():
            average.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    # What the Trainer asks a model about.

    @property
    def config(self) -> Any:
        return getattr(self.student, "config", None) or PreTrainedConfig()

    @property
    def generation_config(self) -> Any:
        return getattr(self.student, "generation_config", None)

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        return getattr(self.student, "_keys_to_ignore_on_save", None)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of layers that FSDP2 shards and gathers one by one: those that the roles' models name and have."""
        named = {name for module in self.role.values() for name in getattr(module, "_no_split_modules", None) or ()}
        return sorted(named & {type(module).__name__ for module in self.modules()})

    @property
    def tp_size(self) -> int | None:
        return tensor_parallel(self.student) or None

    _tp_size = tp_size

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        return tensor_parallel(self.student) > 0

    def tie_weights(self) -> None:
        if hasattr(self.student, "tie_weights"):
            self.student.tie_weights()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)


def trainable_names(networks: Networks) -> dict[str, set[str]]:
    """Return the names of each role's trainable parameters, as they are before any role is switched off."""
    return {
        name: {key for key, p in module.named_parameters() if p.requires_grad} for name, module in networks.role.items()
    }


def trainable(method: Method, name: str) -> Trainable:
    """Return a role that the optimiser moves."""
    role = method.roles[name]
    assert isinstance(role, Trainable), f"{name} is not trained"
    return role


def split_by_role(groups: list[dict[str, Any]], networks: Networks, method: Method) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups, one per role and decay, tagged `role`, with the role's own settings."""
    split = []
    for name, module in networks.role.items():
        own, role = {id(p) for p in module.parameters()}, trainable(method, name)
        settings: dict[str, Any] = {"role": name}
        if role.learning_rate is not None:
            settings["lr"] = role.learning_rate
        if role.betas is not None:
            settings["betas"] = role.betas
        for group in groups:
            if params := [p for p in group["params"] if id(p) in own]:
                decayed = role.weight_decay is not None and group.get("weight_decay", 0) > 0
                split.append(
                    {**group, **settings, "params": params} | ({"weight_decay": role.weight_decay} if decayed else {})
                )
    return split


def own_steps(method: Method, role: str) -> Callable[[int], int]:
    """Return a function: optimiser steps of the run -> how many of them `role` took part in."""
    taken = [0]

    def count(step: int) -> int:
        while len(taken) <= step:
            taken.append(taken[-1] + (role in method.active(len(taken) - 1)))
        return taken[step]

    return count


def schedule_by_role(optimizer: Any, method: Method, args: TrainingArguments, total: int) -> LambdaLR:
    """Return the run's learning-rate schedule of `total` steps, in which each role counts its own.

    Raises ValueError when the schedule looks at more than the step.
    """
    curves = {}
    for role in {group["role"] for group in optimizer.param_groups}:
        count = own_steps(method, role)
        curves[role] = _curve(args, count, count(total))
    return LambdaLR(optimizer, [curves[group["role"]] for group in optimizer.param_groups])


def _curve(args: TrainingArguments, count: Callable[[int], int], total: int) -> Callable[[int], float]:
    model_of_one = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    options: Any = args.lr_scheduler_kwargs or {}
    scheduler = get_scheduler(args.lr_scheduler_type, model_of_one, args.get_warmup_steps(total), total, options)
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(f"training.lr_scheduler_type: {args.lr_scheduler_type} cannot count steps by role")
    curve = scheduler.lr_lambdas[0]
    return lambda step: curve(count(step))


def clip_by_role(networks: Networks, method: Method, active: frozenset[str], default: float) -> dict[str, Tensor]:
    """Clip each active role's gradient to its own norm; return the norms before clipping."""
    norms, limits = {}, clipping_limits(networks, method, default)
    for name in sorted(active):
        norms[name] = _clipped([p for p in networks.role[name].parameters() if p.grad is not None], limits[name])
    return norms


def _clipped(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip to one norm, also where some weights are sliced over ranks and others are not; return it."""
    sliced = [isinstance(p.grad, DTensor) for p in parameters]
    if all(sliced) or not any(sliced):
        return whole(nn.utils.clip_grad_norm_(parameters, limit).detach())
    kinds = [
        [p for p, is_sliced in zip(parameters, sliced, strict=True) if is_sliced is kind] for kind in (True, False)
    ]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm.detach()


def clipping_limits(networks: Networks, method: Method, default: float) -> dict[str, float]:
    """Return the norm that each role's gradient is clipped to."""
    own = {name: trainable(method, name).max_grad_norm for name in networks.role}
    return {name: default if limit is None else limit for name, limit in own.items()}


def counts_of(method: Method, batch: Any) -> dict[str, Tensor]:
    """Return `method.counts(batch)`. Raises ValueError for rows with weights that the method does not count by."""
    if "weight" in batch and not method.weighs:
        raise ValueError(f"data: rows have weights (columns.weight), and {type(method).__name__} counts all alike")
    return method.counts(batch)


def check_plan(method: Method, total: int) -> None:
    """Raise ValueError when a trainable role never moves in a run of `total` steps."""
    for name, role in method.roles.items():
        if isinstance(role, Trainable) and total > 0 and not own_steps(method, name)(total):
            raise ValueError(f"{type(method).__name__}: the role {name!r} is not active in any of the {total} steps")


def role_plan(method: Method, total: int) -> list[str]:
    """Return a line for each role: when it moves in a run of `total` steps, or what it follows."""
    lines = []
    for name, role in method.roles.items():
        if isinstance(role, Trainable):
            moving = [step for step in range(total) if name in method.active(step)]
            first = f", first at step {moving[0] + 1}" if moving and moving[0] else ""
            lines.append(f"{name}: moves in {len(moving)} of {total} steps{first}")
        elif isinstance(role, EmaOf):
            pace = "a step of its own" if role.every == 1 else f"every {role.every} of its own steps"
            lines.append(f"{name}: average of {role.role}, decay {role.decay:g} {pace}")
        else:
            taken = [str(step) for step in range(1, total + 1) if role.at and role.at(step)]
            shown = taken if len(taken) <= 6 else [*taken[:3], "...", taken[-1]]
            when = f"after step {', '.join(shown)}" if shown else "as it starts"
            when = when if role.at else "at the end of every epoch"
            lines.append(f"{name}: copy of {role.role}, taken {when}")
    return lines
