"""What of a recipe decides the shapes of a step."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from kdlm.data import DataSection
from kdlm.methods import REDISection
from kdlm.plan.devices import Device
from kdlm.plan.skeletons import FLASH
from kdlm.preference_settings import by_preferences
from kdlm.recipe import Recipe, across
from kdlm.reward_settings import in_trl


@dataclass(frozen=True)
class Settings:
    """The shapes of a step, all sequences being as long as they may be.

    Attributes:
        device: what the run is planned for.
        args: the run's training arguments.
        batch: sequences of a micro-batch.
        length: tokens of a sequence.
        flat: whether the sequences of a micro-batch lie end to end, without padding.
        masked: whether attention gets a mask, for padding or between sequences.
        accumulation: micro-batches of an optimiser step.
        autocast: the type of mixed precision, or None.
        checkpointing: options of activation checkpointing, or None without it.
        evaluation: sequences of an evaluation batch, 0 where nothing is evaluated.
        steps: optimiser steps of the run, None where it is told in epochs.
    """

    device: Device
    args: TrainingArguments
    batch: int
    length: int
    flat: bool
    masked: bool
    accumulation: int
    autocast: torch.dtype | None
    checkpointing: dict[str, Any] | None
    evaluation: int
    steps: int | None

    @property
    def rows(self) -> int:
        """Kept rows of a micro-batch: every token but one a sequence predicts another."""
        return self.batch * self.length

    @classmethod
    def of(cls, recipe: Recipe, device: Device) -> "Settings":
        """Read a recipe for a device.

        Raises ValueError for what plan does not cover.
        """
        if not isinstance(recipe.data, DataSection):
            raise ValueError(f"data: plan covers text recipes so far, not {recipe.data.name}")
        if across(recipe):
            raise ValueError(f"method: plan covers methods of one tokenizer so far, not {recipe.method.name}")
        if in_trl(recipe) or by_preferences(recipe):
            raise ValueError(f"method: plan covers kdlm's own trainers so far, and {recipe.method.name} runs in TRL's")
        given = recipe.training
        bf16 = device.bf16 if given.bf16 is None else given.bf16
        half = torch.float16 if given.fp16 else torch.bfloat16 if bf16 else None
        alone = {"use_cpu": True, "bf16": False, "fp16": False, "fsdp": None, "fsdp_config": None, "deepspeed": None}
        args = given.model_copy(update=alone).build(output_dir="plan")
        data, batch, length = recipe.data, args.per_device_train_batch_size, recipe.data.max_length
        if recipe.rollouts is not None:
            batch *= recipe.rollouts.sampling.samples_per_prompt
            length = (recipe.rollouts.prompt_tokens or length) + recipe.rollouts.sampling.max_new_tokens
        sides = 2 if isinstance(recipe.method, REDISection) else 1  # sequences of a row
        batch *= sides
        flat = data.packing != "none"
        several = batch > 1 or data.packing == "pack"
        attention = getattr(getattr(recipe.student, "source", recipe.student), "attention", "auto")
        evaluated = any(part is not None for part in (data.eval, data.eval_fraction, data.eval_rows))
        checkpointed = getattr(args, "activation_checkpointing", False)
        given_options: Any = getattr(args, "activation_checkpointing_kwargs", None)
        return cls(
            device=device,
            args=args,
            batch=batch,
            length=length,
            flat=flat,
            masked=several and attention not in FLASH,
            accumulation=args.gradient_accumulation_steps,
            autocast=half,
            checkpointing=dict(given_options or {}) if checkpointed else None,
            evaluation=sides * args.per_device_eval_batch_size if evaluated else 0,
            steps=args.max_steps if args.max_steps > 0 else None,
        )
