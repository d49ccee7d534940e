"""The Trainer's checkpoints, sealed; those of several networks, with the state of method and teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import PushToHubMixin

from kdlm import checkpoints, deepspeed, deepspeed_checkpoints
from kdlm.methods import Method
from kdlm.models import tensor_parallel
from kdlm.networks import Networks
from kdlm.sharded_checkpoints import (
    kind_of,
    load_optimizer,
    load_schedule,
    load_weights,
    save_in_pieces,
    whole_weights,
)


class SealedCheckpoints(Trainer):
    """The part of a trainer that saves checkpoints which are whole or not there."""

    @property
    def student(self) -> Any:
        """The model being trained."""
        return self.model

    def exported_weights(self) -> dict[str, Tensor] | None:
        """Return the whole weights of what a finished run hands out, where it is in shards; None elsewhere."""
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        writes, student = self.args.should_save, self.student
        if not writes and not tensor_parallel(student):  # every rank comes here, to gather slices or for nothing
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if isinstance(student, PreTrainedModel):
            # Not by the names of an older release, which resuming would not find in the model.
            options: Any = {"save_original_format": False, "is_main_process": writes}
            student.save_pretrained(folder, state_dict=state_dict, **options)
        elif hasattr(student, "save_pretrained"):
            student.save_pretrained(folder, state_dict=state_dict)
        else:
            checkpoints.save_module(student, folder)
        if self.processing_class is not None and writes:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, seal, and only then delete old checkpoints."""
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.clear(folder)
        self.accelerator.wait_for_everyone()
        # Whether the best checkpoint is this one the Trainer asks by its folder, before FSDP2's pieces make it.
        folder.mkdir(parents=True, exist_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal(folder)
            checkpoints.prune(run, limit, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse weights that the student has no place for: a run would go on from others."""
        if foreign := load_result.unexpected_keys:
            raise ValueError(
                f"{type(self.student).__name__} has no place for {len(foreign)} weights of the checkpoint "
                f"({foreign[0]} ...): it is of another model or release of transformers"
            )
        super()._issue_warnings_after_load(load_result)


@dataclass(frozen=True)
class HandOver:
    """What a run that is one stage of several takes over beside its student, and what it leaves to later ones.

    Attributes:
        taken: roles whose networks go on -> the run folder that they were left in.
        left: roles whose networks are written into the run's folder at its end.
        begins: called by the main process when everything is loaded and before anything is written.
    """

    taken: Mapping[str, Path] = field(default_factory=dict)
    left: Sequence[str] = ()
    begins: Callable[[], None] = lambda: None

    def take(self, networks: Networks) -> None:
        """Put the weights that were left into the networks. Raises ValueError where they do not fit."""
        for name, folder in self.taken.items():
            module = self._role(networks, name)
            path = folder / checkpoints.AUXILIARY / f"{name}.safetensors"
            with safe_open(path, "pt") as file:
                theirs = {key: file.get_slice(key).get_shape() for key in file.keys()}
            ours = {key: list(value.shape) for key, value in module.state_dict().items()}
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    raise ValueError(
                        f"carry: {name}: {key} is {ours.get(key) or 'not there'} here, and {folder} left "
                        f"{theirs.get(key) or 'none'}: give both stages the same layers and sizes, or leave it out"
                    )
            checkpoints.load_auxiliary(folder, {name: module})

    def leave(self, networks: Networks, folder: Path, *, writes: bool) -> None:
        """Write the networks that a later stage takes; every rank must call."""
        if self.left:
            for name in self.left:
                self._role(networks, name)
            weights = networks.auxiliary_weights()
            if writes:
                checkpoints.save_auxiliary(folder, {name: weights[name] for name in self.left}, {})

    @staticmethod
    def _role(networks: Networks, name: str) -> nn.Module:
        known = [role for role in networks.role if role != "student"]
        if name not in known:
            raise ValueError(
                f"carry: the method trains no {name!r} beside the student, but {', '.join(known) or 'none'}"
            )
        return networks.role[name]


class RoleCheckpoints(SealedCheckpoints):
    """The part of a `DistillTrainer` that saves and loads."""

    networks: Networks
    method: Method
    teacher: Any
    order: Any
    sparsity: Any = None
    """What holds pruned weights at zero."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student; into a checkpoint also what belongs to the run and not to the student."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            return
        weights = self.networks.auxiliary_weights()
        pruned = {} if self.sparsity is None else self.sparsity.state_dict()  # every rank gathers
        if self.args.should_save:
            states = {"method": self.method.state_dict(), "sparsity": pruned}
            if hasattr(self.teacher, "state_dict"):
                states["teacher"] = self.teacher.state_dict()
            if self.order is not None:
                states["sampler"] = self.order.state_dict()
            folder = Path(output_dir or str(self.args.output_dir))
            checkpoints.save_auxiliary(folder, weights, states)

    def exported_weights(self) -> dict[str, Tensor] | None:
        """As ever, on rank 0 and nothing on others; every rank must ask. An average is whole on every rank already."""
        name = self.method.exported
        if name in self.networks.averages:
            return None
        return deepspeed.whole_weights(self, name) if self.is_deepspeed_enabled else whole_weights(self.networks, name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        prefix = "role.student."
        weights = None
        if state_dict is not None:
            weights = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        super()._save(output_dir, weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoints.verify(folder)
        deepspeed_checkpoints.require_kind(folder, self.is_deepspeed_enabled)
        if self.is_deepspeed_enabled:  # its engine holds all roles
            deepspeed_checkpoints.load(self.model_wrapped, folder)
            checkpoints.load_auxiliary(folder, self.networks.averages)
        elif self._by_names(folder):
            load_weights(folder, self.networks)
            checkpoints.load_auxiliary(folder, self.networks.averages)
        else:
            self._load_student(resume_from_checkpoint)
            checkpoints.load_auxiliary(folder, self.networks.auxiliary())
        self.method.load_state_dict(checkpoints.load_state(folder, "method"))
        if self.sparsity is not None:
            self.sparsity.load_state_dict(checkpoints.load_state(folder, "sparsity"))
        self._order_state = checkpoints.load_state(folder, "sampler") or None
        if hasattr(self.teacher, "load_state_dict"):
            self.teacher.load_state_dict(checkpoints.load_state(folder, "teacher"))

    def _load_best_model(self) -> None:
        """Take the best checkpoint's networks; the run is over, so its method state is of no more use."""
        folder = Path(str(self.state.best_model_checkpoint))
        if self.is_deepspeed_enabled:
            deepspeed_checkpoints.load(self.model_wrapped, folder)  # also where other ranks saved it, before a resume
            checkpoints.load_auxiliary(folder, self.networks.averages)
        elif self._by_names(folder):
            load_weights(folder, self.networks)
            checkpoints.load_auxiliary(folder, self.networks.averages)
        else:
            self._load_student(str(folder))
            checkpoints.load_auxiliary(folder, self.networks.auxiliary())

    def _by_names(self, folder: Path) -> bool:
        """Whether a checkpoint is read by the names of whole weights, by this run or as it was saved."""
        return self.is_fsdp_enabled or tensor_parallel(self.networks.student) > 0 or kind_of(folder) != "plain"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, which would save rank 0's slice of an optimiser where layers are sliced over ranks."""
        if not tensor_parallel(self.networks.student):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_in_pieces(Path(output_dir), self.networks, self.optimizer)
        if self.args.should_save:
            torch.save(cast("Any", self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, and what is to be taken up whatever the ranks were."""
        if checkpoint is None or not self._by_names(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(Path(checkpoint), self.networks, self.optimizer)
        load_schedule(Path(checkpoint) / SCHEDULER_NAME, self.lr_scheduler)

    def _load_student(self, folder: str) -> None:
        student = self.networks.student
        if isinstance(student, PushToHubMixin):  # transformers' models and PEFT's
            super()._load_from_checkpoint(folder, model=cast("nn.Module", student))
        elif hasattr(student, "load_weights"):
            student.load_weights(Path(folder))
        else:
            checkpoints.load_module(student, Path(folder))
