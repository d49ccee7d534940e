"""PrivateTrainer, PrivateOnPolicyTrainer: any method by DP-SGD, with one training row as the unit of privacy.

The unit is a row of the data with all that a step makes of it: on the student's own text, a prompt with all its
rollouts (DP-OPD, arXiv 2604.04461; its code is not public, what is done here follows its summary). Each step draws each
row with the same probability; the loss of a unit is the mean over its own tokens; its gradient is clipped, and the sum
over units gets noise once.
"""

import json
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdlm.disk import write_text
from kdlm.guards import GuardsSection
from kdlm.methods import Terms
from kdlm.on_policy import OnPolicyTrainer
from kdlm.privacy.rows import PoissonBatches, lacked_room, row_count
from kdlm.privacy.section import PrivacySection, refused, stops
from kdlm.rollouts import Opaque, Row, Slot, end_ids
from kdlm.trainer import Counts, DistillTrainer

NO_OPACUS = "privacy: it needs Opacus: pip install 'kdlm[privacy]'"
WEIGHTS = "a unit's loss is the mean over its own tokens, in which the weight of its row cancels: leave it out"
STATE = "privacy.json"
UNIT = "one training sequence (of a longer text, one of its pieces) with all its rollouts, added or removed"


class PrivateTrainer(DistillTrainer):
    """A DistillTrainer whose steps are those of DP-SGD.

    `per_device_train_batch_size * gradient_accumulation_steps` is the expected number of units in a step; the true one
    varies, and may be 0. A clip stands in the place of `max_grad_norm`, which is not looked at.

    Args:
        model, teacher, args, **options: as of `DistillTrainer`.
        privacy: clip, noise or epsilon, delta.

    Raises ValueError, naming the key, where something would break the guarantee, and without Opacus.
    """

    def __init__(self, model: Any, teacher: Any = None, args: Any = None, *, privacy: PrivacySection, **options: Any):
        super().__init__(model, teacher, args, **options)
        try:
            from kdlm.privacy.optimizer import noise_for
        except ImportError as error:
            raise ValueError(NO_OPACUS) from error
        self.privacy, self.rows = privacy, row_count(self.train_dataset)
        self.expected = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        if problems := list(self._refused()):
            raise ValueError("\n".join(problems))
        self.rate, self.pass_steps = self.expected / self.rows, ceil(self.rows / self.expected)
        steps = self.args.max_steps if self.args.max_steps > 0 else ceil(self.args.num_train_epochs * self.pass_steps)
        self.noise = noise_for(privacy, self.rate, steps)
        self._private: Any = None
        self._history: list[Any] = []
        self._take_key(secrets.token_hex(32) if privacy.seed is None else str(privacy.seed))
        self._units, self._paced = 0, torch.zeros(())  # of the step
        self._logged_units, self._clipped = 0, torch.zeros(())  # since the last line of the log

    def _refused(self) -> Iterator[str]:
        yield from refused(self.args, self.method, getattr(self, "section", None))
        if getattr(self.teacher, "needs_fit", False):
            yield "teacher: it learns its weights from held-out rows, which no noise covers"
        trained = [p.dtype for p in self.networks.parameters() if p.requires_grad]
        if any(kind not in (torch.float32, torch.float64) for kind in trained):
            yield "student.dtype: clipping and noise need trained weights in float32 (bf16: true computes in less)"
        if "weight" in next(iter(self.train_dataset), {}):
            yield f"data: columns.weight: {WEIGHTS}"
        if self.expected > self.rows:
            yield f"training.per_device_train_batch_size: a step expects {self.expected} rows, there are {self.rows}"
        if self.privacy.delta * self.rows >= 1:
            yield f"privacy.delta: {self.privacy.delta:g} is not less than one in {self.rows} rows: use a smaller one"

    def _take_key(self, key: str) -> None:
        """Take what all seeds are made of."""
        self._key = key

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but once: a second run of the same object would draw the same rows again."""
        if self._private is not None:
            raise RuntimeError("a private trainer trains once: make another one, which may go on from a checkpoint")
        return super().train(*args, **kwargs)

    def guard(self, section: GuardsSection) -> None:
        """As ever; raises ValueError for a guard that stops, too."""
        if problems := list(stops(section)):
            raise ValueError("\n".join(problems))
        super().guard(section)

    def spent(self) -> dict[str, Any]:
        """Return what is promised of the student as it is now: epsilon and delta of the steps done, and of what."""
        done = self._private.done if self._private is not None else 0
        epsilon = self._private.epsilon if self._private is not None else 0.0
        return {
            "epsilon": epsilon if epsilon < float("inf") else None,
            "delta": self.privacy.delta,
            "unit": UNIT,
            "noise": self.noise,
            "clip": self.privacy.clip,
            "rows": self.rows,
            "sampling_rate": self.rate,
            "expected_batch": self.expected,
            "steps": done,
            "accountant": self.privacy.accountant,
        }

    def drawn_seed(self, what: str, *place: int) -> int:
        """Return the seed of something that is drawn at random, of which nobody else may know."""
        return random.Random(" ".join([self._key, what, *map(str, place)])).getrandbits(62)

    # Rows

    def get_train_dataloader(self) -> DataLoader:
        """Draw each row with the same probability for every step (Poisson sampling)."""
        args = self.args
        batches = PoissonBatches(
            self.rows,
            self.rate,
            steps=self.pass_steps,
            parts=args.gradient_accumulation_steps,
            first=lambda: self.state.global_step,
            seed=partial(self.drawn_seed, "rows"),
        )
        loader = DataLoader(
            cast("Any", self.train_dataset),
            batch_sampler=batches,
            collate_fn=self._collate(),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def _collate(self) -> Callable[[list[Row]], Any]:
        return partial(_units, cast("Any", self.data_collator))

    def _announce(self, batches: list[Any]) -> None:
        super()._announce([unit for micro in batches for unit in micro["units"]])

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Counts:
        return {"units": torch.tensor(sum(len(micro["units"]) for micro in batch_samples), device=device)}

    # One step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add each unit's clipped gradient to the step's sum; return this micro-batch's share of the mean loss."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for unit in inputs["units"]:
            batch = self._prepare_inputs(unit)
            counts = {name: count.to(self.args.device) for name, count in self.method.counts(batch).items()}
            torch.manual_seed(self.drawn_seed("dropout", self.state.global_step, self._units))
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch, num_items_in_batch=counts)
            self.accelerator.backward(loss)
            norm = self._private.take_unit()
            self._clipped = self._clipped + (norm > self.privacy.clip)
            self._units += 1
            total += loss.detach().to(total)
        return total / num_items_in_batch["units"].clamp(min=1)

    def _reduce(self, terms: Terms, counts: Counts) -> Tensor:
        loss = super()._reduce(terms, counts)
        if not terms.more:
            self._paced = self._paced + self._count
        return loss

    def _after_step(self) -> None:
        for name, value in self._means.items():  # of units, each of them a mean of its own
            self._means[name] = value / max(1, self._units)
        self._count = self._paced
        super()._after_step()
        self._logged_units += self._units
        self._units, self._paced = 0, torch.zeros(())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epsilon of the steps done, and the share of units whose gradient was clipped."""
        if "loss" in logs and self._private is not None:
            logs |= {
                "privacy/clipped": float(self._clipped) / max(1, self._logged_units),
                "privacy/units": self._logged_units / max(1, self._window.steps),
            }
            if self.noise:
                logs["privacy/epsilon"] = self._private.epsilon
            self._logged_units, self._clipped = 0, torch.zeros(())
        super().log(logs, start_time)

    # Optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The one that `DistillTrainer` makes, behind Opacus's clipping and noise."""
        from kdlm.privacy.optimizer import UnitByUnit

        made: Any = super().create_optimizer(model)
        if self._private is None:
            self.optimizer = self._private = UnitByUnit(
                made,
                self.privacy,
                noise=self.noise,
                expected=self.expected,
                rate=self.rate,
                seed=partial(self.drawn_seed, "noise"),
                device=self.args.device,
            )
            self._private.accountant.history = self._history
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None  # units are clipped already, and a second clip would only bend the noise

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._private.sum_norm()

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write into a checkpoint also the steps accounted for, and the key of what is drawn at random: a secret."""
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            history = [] if self._private is None else self._private.accountant.history
            state = {"key": self._key, "noise": self.noise, "rate": self.rate, "history": history}
            file = Path(output_dir or str(self.args.output_dir)) / STATE
            write_text(file, json.dumps(state))
            file.chmod(0o600)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / STATE
        if not file.is_file():
            raise ValueError(f"{file.parent}: not a checkpoint of a private run, its steps are not accounted for")
        state = json.loads(file.read_text())
        if (state["noise"], state["rate"]) != (self.noise, self.rate):
            raise ValueError(
                f"privacy: the run began with noise {state['noise']:g} and a sampling rate of {state['rate']:g}, now "
                f"they are {self.noise:g} and {self.rate:g}: keep training's steps and batch size as they were"
            )
        self._take_key(state["key"])
        self._history = [tuple(entry) for entry in state["history"]]


class PrivateOnPolicyTrainer(PrivateTrainer, OnPolicyTrainer):
    """An OnPolicyTrainer whose steps are those of DP-SGD: all rollouts of a prompt are one unit.

    Args: as of both.
    """

    def _take_key(self, key: str) -> None:
        super()._take_key(key)
        self.rounds.seed = self.drawn_seed("rollouts")

    def _collate(self) -> Callable[[list[Row]], Any]:
        return Opaque

    def _laid_out(self, slot: Slot, place: int) -> dict[str, Any]:
        """Return one micro-batch: for each prompt a batch of its own."""
        rows, own = slot.micro[place], slot.written[place] if slot.written else []
        most = self.section.sampling.max_new_tokens
        if any(lacked_room(one, most, end_ids(self.student, self.processing_class)) for one in own):
            raise ValueError(
                f"rollouts.sampling.max_new_tokens: {most} tokens do not fit behind every prompt, and where one "
                "ends would depend on the prompts beside it: use fewer, or a smaller data.max_length"
            )
        each = len(own) // max(1, len(rows))
        by_row = [own[number * each : (number + 1) * each] for number in range(len(rows))]
        given = [[] if slot.text == "student" else [row] for row in rows]
        return {"units": [self.batch_of(*unit) for unit in zip(given, by_row, strict=True)]}


def _units(collate: Callable[[Sequence[Row]], dict[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    return {"units": [collate([row]) for row in rows]}
