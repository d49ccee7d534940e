"""CollapseGuards: looks at a language model in training, warns, and ends the run with a checkpoint."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from kdlm.data import Prefetched
from kdlm.evaluation.section import EvaluationSection
from kdlm.evaluation.watch import Watch, share_of
from kdlm.guards.course import PREFIX, Course, Crossing, refuse_stopped
from kdlm.guards.section import CAUSAL, GuardsSection
from kdlm.losses import IGNORE_INDEX
from kdlm.models import Predictor, evaluating, view
from kdlm.quality import text_figures

logger = logging.getLogger(__name__)

TOLD = {"entropy": ("student_entropy", "entropy"), "length": ("completions/mean_length",)}
"""What other Trainers log of a figure: TRL's."""


class CollapseGuards(TrainerCallback):
    """Watches figures of a student as a section says. It reads without gradients and draws nothing at random, so that
    a run that is not stopped ends with the weights that it would have had without.

    To be made before training: the student is then as it starts. `DistillTrainer.guard` adds it; another Trainer of a
    language model takes it by `add_callback`, and is asked for entropy and length in its own log lines.

    Args:
        trainer: a `DistillTrainer`, or a Trainer of transformers or TRL.
        section: what is watched.

    Raises ValueError, naming the key, for what cannot be read in this run.
    """

    def __init__(self, trainer: Any, section: GuardsSection):
        ours = hasattr(trainer, "networks")
        student = trainer.networks.views["student"] if ours else view(trainer.model)
        if not isinstance(student, Predictor):
            raise ValueError("guards: they watch language models, and the student is none")
        if student.mask_id is not None:
            raise ValueError(CAUSAL)
        if ours:
            section.require(writes="rollouts" in trainer.provides, prefers="preferences" in trainer.method.needs)
        for name in () if ours else ("repetition", "chosen_nll"):
            if name in section.watched:
                raise ValueError(f"guards.{name}: it is read where a DistillTrainer trains")
        self.trainer, self.section, self.student, self.ours = trainer, section, student, ours
        self.course = Course(section)
        self.stopped: Crossing | None = None
        """What ended the run."""
        self.reading = Watch(EvaluationSection(), trainer, student)
        if section.kl_to_start is not None:
            start = getattr(getattr(trainer, "_watch", None), "start", None)  # one copy is enough
            self.forgetting = Watch(EvaluationSection(start=True), trainer, student, start=start)
        self.sample: list[Any] | None = None
        self.batch: Any = None
        self.written: list[list[int]] = []
        self.told: dict[str, Any] = {}

    # What a look has to go by

    def note(self, batch: Mapping[str, Any]) -> None:
        """Take in a micro-batch that is trained on."""
        if not self._due(self.trainer.state.global_step + 1):
            return
        self.batch = batch
        if "sampled" in batch and self.section.watched.keys() & {"length", "repetition"}:
            self.written.extend(drawn(batch))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ours and self._due(state.global_step + 1):
            means = self.trainer._means
            self.told = {name: means[name] for name in ("student_entropy", "chosen_log_prob") if name in means}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.ours and logs and "loss" in logs:
            names = {figure: next((key for key in keys if key in logs), None) for figure, keys in TOLD.items()}
            self.told = {figure: logs[key] for figure, key in names.items() if key is not None}

    # Looks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = None
        self.course = refuse_stopped(self.section, state.log_history, args.output_dir)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._due(state.global_step):
            return
        with evaluating(self.student.module):
            figures = self.figures()
        self.batch, self.written, self.told = None, [], {}
        due = control.should_log
        if figures:
            self.trainer.log({f"{PREFIX}{name}": value for name, value in figures.items()})
        control.should_log = due  # a line of ours takes no other's place
        for crossing in self.course.take(state.global_step, figures):
            if state.is_world_process_zero:
                logger.warning("%s; %s", crossing, crossing.advice)
            if crossing.level == "stop":
                self.stopped = self.stopped or crossing
                control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped is not None:  # within an epoch, which has not ended: its checkpoint is written already
            control.should_save = control.should_evaluate = False

    def figures(self) -> dict[str, float]:
        """Return what is watched, of all ranks together."""
        watched = self.section.watched
        found: dict[str, float] = {}
        if not self.ours:
            found |= {name: float(value) for name, value in self.told.items() if name in watched}
        else:
            if "entropy" in watched:
                found["entropy"] = self._entropy()
            if "chosen_nll" in watched:
                found["chosen_nll"] = -self.trainer._reduced(self.told)["chosen_log_prob"].item()
            found |= {name: value for name, value in self._of_text().items() if name in watched}
        if "kl_to_start" in watched:
            found |= self.forgetting.read(self._sample(), ())
        return found

    def _entropy(self) -> float:
        """Return what the method measured in this step, or else the student's entropy on the last micro-batch."""
        if "student_entropy" in self.told:
            return self.trainer._reduced(self.told)["student_entropy"].item()
        return self.reading.read([self.batch], ("student_entropy",))["student_entropy"]

    def _of_text(self) -> dict[str, float]:
        """Return the means over the completions of this step; nothing where there are none."""
        if "rollouts" not in self.trainer.provides:
            return {}
        own, count = text_figures(self.written, [False] * len(self.written)), float(len(self.written))
        names = {"length": "length", "repetition": "repetition_4"}
        sums = {name: torch.tensor([own.get(key, 0.0) * count, count]) for name, key in names.items()}
        totals = self.trainer._reduced(sums)
        return {name: (total / number).item() for name, (total, number) in totals.items() if number}

    def _sample(self) -> list[Any]:
        """Return this rank's batches of the rows that `kl_to_start` is read on."""
        if self.sample is None:
            splits = self.trainer.eval_dataset
            held_out = next(iter(splits.values())) if isinstance(splits, dict) else splits
            rows: Any = self.trainer.train_dataset if held_out is None else held_out
            count, collate = self.section.rows, self.trainer.data_collator
            some = EvaluationSection(rows=count).chosen(rows) if hasattr(rows, "__len__") else islice(iter(rows), count)
            collate = collate.collate if isinstance(collate, Prefetched) else collate  # no teacher is asked
            self.sample = list(share_of(list(_labelled(some)), self.trainer.args, collate))
        return self.sample

    def _due(self, step: int) -> bool:
        return step == 1 or step % self.section.every == 0


def drawn(batch: Mapping[str, Any]) -> list[list[int]]:
    """Return the tokens that the student drew, for each of its sequences in a batch."""
    own: Tensor = batch["sampled"].reshape(-1).bool()
    numbers, ids = batch["sequence"].reshape(-1)[own], batch["input_ids"].reshape(-1)[own]
    return [ids[numbers == number].tolist() for number in numbers.unique()]


def _labelled(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield rows of which some token counts: of a prompt without an answer all do."""
    for row in rows:
        alone = all(label == IGNORE_INDEX for label in row["labels"])
        yield {**row, "labels": row["input_ids"]} if alone else row
