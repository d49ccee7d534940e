"""TRL's trainers of preferences on kdlm's rows: DPOTrainer, and CPOTrainer for SimPO.

Losses, metrics and the loop are TRL's. What is added are batches of rows that are tokenised already, checkpoints from
which a run goes on as it was, and what any run leaves behind.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from kdlm import checkpoints
from kdlm.data import Collator
from kdlm.data.load import pad_id
from kdlm.losses import IGNORE_INDEX
from kdlm.models import begins_as_its_base
from kdlm.progress import memory_gib
from kdlm.role_checkpoints import SealedCheckpoints

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that CPOTrainer may move is our burden, not the reader's
from trl.experimental.cpo import CPOConfig, CPOTrainer

__all__ = ["CPOConfig", "PreferenceCPOTrainer", "PreferenceDPOTrainer", "Sides"]


@dataclass(frozen=True)
class Sides:
    """Makes a batch as TRL's trainers read it, of rows of preferences.

    Attributes:
        pad_id: token id of padding.
        apart: as CPOTrainer wants it, the sides under names of their own; else as DPOTrainer does, the chosen rows and
            then the rejected ones, with `completion_mask` where a token is trained on.
    """

    pad_id: int
    apart: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = Collator(self.pad_id)(rows)
        names = ("input_ids", "attention_mask", "labels")
        sides = {"chosen": ~batch["rejected"], "rejected": batch["rejected"]}
        if self.apart:
            return {f"{side}_{name}": batch[name][which] for side, which in sides.items() for name in names}
        both = {name: torch.cat([batch[name][which] for which in sides.values()]) for name in names}
        trained = both.pop("labels") != IGNORE_INDEX
        return both | {"completion_mask": trained.long()}


class RunInTRL(SealedCheckpoints):
    """What a trainer of TRL's lacks to end as any run of kdlm does."""

    guards = None
    """What watches a `DistillTrainer` for collapse; nothing here."""

    @property
    def exported(self) -> Any:
        """The network that a finished run hands out."""
        return self.student

    def close(self) -> None:
        """Let go of what a run holds beside its weights: nothing here."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the memory in use."""
        if "loss" in logs:
            logs["memory_gib"] = memory_gib()
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.verify(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none: a run folder is no repository of TRL's, and a student gets kdlm's own card."""

    def _send_telemetry(self) -> None:
        """Send none."""


class PreferenceDPOTrainer(RunInTRL, DPOTrainer):
    """TRL's DPOTrainer on rows of `kdlm.data`.

    Args:
        model, ref_model, args, **options: as of `trl.DPOTrainer`; a model of fresh adapters is compared with itself
            without them.
        processing_class: the tokenizer.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *, processing_class: Any, **options: Any):
        fresh = ref_model is None and hasattr(model, "peft_config") and begins_as_its_base(model)
        options["data_collator"] = Sides(pad_id(processing_class), apart=False)
        super().__init__(model, ref_model, args, processing_class=processing_class, **options)
        if fresh:  # TRL has copied the adapters to be the reference, which would be saved and handed out with them
            self.accelerator.unwrap_model(self.model).delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """Return the rows as they are: they are tokenised."""
        return dataset


class PreferenceCPOTrainer(RunInTRL, CPOTrainer):
    """TRL's CPOTrainer, whose losses include SimPO's, on rows of `kdlm.data`; arguments as there."""

    def __init__(self, model: Any, args: Any = None, *, processing_class: Any, **options: Any):
        options["data_collator"] = Sides(pad_id(processing_class), apart=True)
        super().__init__(model, args, processing_class=processing_class, **options)

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """Return nothing new: the rows are tokenised."""
        return {}
