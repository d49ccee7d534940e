"""Masking: prunes a student by a schedule while any method trains it, and holds what was pruned at zero."""

from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from kdlm.data import Prefetched
from kdlm.deepspeed import cuts_weights
from kdlm.models import Predictor
from kdlm.packs.quantization import from_bits, to_bits
from kdlm.parallelism import refuse_with_slices
from kdlm.sharding import own, part_like, whole_like
from kdlm.sparsity.calibration import input_norms
from kdlm.sparsity.layers import apply, magnitudes, prunable
from kdlm.sparsity.masks import Masks, masks_of
from kdlm.sparsity.section import OneShot, SparsitySection


class Masking(TrainerCallback):
    """Prunes before the first step and after those at which the schedule rises, and applies its masks after every one.

    Gradients of pruned weights are set to zero as they come, so that norms for clipping are of what trains, and what
    the optimiser keeps of a weight (momentum, second moments) is set to zero when it goes. With that, optimisers that
    look at each weight alone leave pruned ones where they are; others (Muon) move them, and the mask takes it back.

    Where ranks hold whole weights, the masks are rank 0's on all of them. Under FSDP2 each rank has those of its own
    rows, ranked with the rows of all. Whole ones stand in checkpoints: a run goes on from them on any number of ranks.

    Args:
        trainer: a `DistillTrainer`; `DistillTrainer.sparsify` makes this of it.
        section: what goes, and when.

    Raises ValueError, naming the key, where the run cannot be sparse.
    """

    def __init__(self, trainer: Any, section: SparsitySection):
        refuse(trainer.args, trainer.method, section)
        if cuts_weights(trainer.accelerator):
            raise ValueError(
                "sparsity: masks are of rows of a weight, and ZeRO-3 cuts weights anywhere: use FSDP2, ZeRO-2 or data "
                "parallelism"
            )
        refuse_with_slices(trainer.networks.student, "sparsity")
        self.trainer, self.section = trainer, section
        self.layers = prunable(trainer.networks.student, section)
        self.student = trainer.networks.views["student"]
        if section.criterion == "wanda" and not isinstance(self.student, Predictor):
            raise ValueError("sparsity.criterion: wanda reads language models, and the student is none: use magnitude")
        masks_of(magnitudes(self.layers), {}, section, 0.0)  # says which rows the groups of n:m do not fit
        self.masks: Masks = {}
        self.share = 0.0
        """What is pruned by now."""
        self._mask_gradients()  # before DeepSpeed's hooks, which take gradients away

    def _mask_gradients(self) -> None:
        for name, layer in self.layers.items():
            layer.weight.register_post_accumulate_grad_hook(self._masked(name))

    def _masked(self, name: str):
        def hook(weight: Tensor) -> None:
            if name in self.masks and weight.grad is not None:
                own(weight.grad).masked_fill_(self.masks[name], 0.0)

        return hook

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._others is not None:  # other parameters have come into the layers
            self._mask_gradients()
        last = self.section.share_at(state.max_steps - 1, state.max_steps)
        if state.max_steps and last < self.section.target:
            raise ValueError(
                f"sparsity.schedule: in {state.max_steps} steps it comes to {last:g} and not to "
                f"{self.section.target:g}: leave levels out, or train longer"
            )
        self._advance(state, control)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        apply(self.layers, self.masks)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state, control)

    def _advance(self, state: Any, control: Any) -> None:
        """Prune what the schedule has pruned by now; it never brings weights back, nor after the last step."""
        share = self.section.share_at(state.global_step, state.max_steps)
        if share > self.share and state.global_step < state.max_steps:
            self.prune(share)
            due = control.should_log
            self.trainer.log({"sparsity": share})
            control.should_log = due  # a line of ours takes no other's place

    @property
    def _others(self) -> Any:
        """The ranks that hold rows of the layers between them; None where this one has whole layers."""
        weight = next(iter(self.layers.values())).weight
        return weight.device_mesh.get_group() if isinstance(weight, DTensor) else None

    def prune(self, share: float) -> None:
        """Prune up to this share by the section's criterion, with what the optimiser keeps of pruned weights."""
        scores = magnitudes(self.layers)
        if self.section.criterion == "wanda":
            with self.trainer.accelerator.autocast():
                norms = self.trainer.networks.ask(partial(input_norms, self.student, self.layers, self._rows()))
            scores = {name: value * norms[name] for name, value in scores.items()}
        masks = masks_of(scores, self.masks, self.section, share, self._others)
        if self._others is None and self.trainer.accelerator.num_processes > 1:
            masks = {name: broadcast(mask.to(torch.uint8)).bool() for name, mask in masks.items()}
        self.masks, self.share = masks, share
        apply(self.layers, self.masks)
        self._forget()

    def _forget(self) -> None:
        """Set to zero what the optimiser keeps of each pruned weight. Quantised states decay on their own."""
        states = {} if self.trainer.optimizer is None else self.trainer.optimizer.state
        for name, mask in self.masks.items():
            for value in states.get(self.layers[name].weight, {}).values():
                if type(value) in (Tensor, DTensor) and value.is_floating_point() and own(value).shape == mask.shape:
                    own(value).masked_fill_(mask.to(value.device), 0.0)

    def _rows(self) -> list[dict[str, Tensor]]:
        """Return the batches of the calibration rows, the same on every rank."""
        trainer, collate = self.trainer, self.trainer.data_collator
        collate = collate.collate if isinstance(collate, Prefetched) else collate  # no teacher is asked
        some = list(islice(iter(trainer.train_dataset), self.section.calibration_rows))
        size = trainer.args.eval_batch_size
        return [trainer._prepare_inputs(collate(some[i : i + size])) for i in range(0, len(some), size)]

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks of whole layers, one bit a weight, and their share; every rank must ask."""
        return {"share": torch.tensor(self.share, dtype=torch.float64)} | {
            f"mask.{name}": to_bits(whole_like(mask, self.layers[name].weight)) for name, mask in self.masks.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave. Raises ValueError where it is of other layers."""
        if "share" not in state:
            raise ValueError("sparsity: the checkpoint is of a run without it")
        masks = {key.removeprefix("mask."): bits for key, bits in state.items() if key != "share"}
        if masks and masks.keys() != self.layers.keys():
            raise ValueError("sparsity.modules: the checkpoint's masks are of other layers")
        self.share = state["share"].item()
        weights = {name: self.layers[name].weight for name in masks}
        self.masks = {
            name: part_like(
                from_bits(bits, weights[name].numel()).view(weights[name].shape).to(weights[name].device), weights[name]
            )
            for name, bits in masks.items()
        }
        apply(self.layers, self.masks)


def refuse(args: Any, method: Any, section: SparsitySection) -> None:
    """Raise ValueError, naming the key, where what is handed out would not be the sparse student."""
    if method.exported != "student":
        raise ValueError(
            "sparsity: the run hands out an average, in which weights are what they were before they went: hand out "
            "the student itself (method.ema: null)"
        )
    if args.load_best_model_at_end and not isinstance(section.schedule, OneShot):
        raise ValueError(
            "sparsity.schedule: the best checkpoint may be one with more weights than the last: use one_shot, or leave "
            "evaluation.best (training.load_best_model_at_end) out"
        )
