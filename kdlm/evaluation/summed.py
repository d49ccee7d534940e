"""SummedEvaluation: the Trainer's evaluation, as sums over all rows of all ranks that are divided once."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from kdlm.deepspeed import cuts_weights
from kdlm.evaluation.in_step import in_step
from kdlm.evaluation.section import EvaluationSection, unknown
from kdlm.evaluation.watch import Watch, share_of
from kdlm.guards.callback import CollapseGuards
from kdlm.guards.section import GuardsSection
from kdlm.losses import kept_rows
from kdlm.methods import Method
from kdlm.models import tensor_parallel
from kdlm.networks import Networks, counts_of
from kdlm.parallelism import refuse_with_parts, refuse_with_slices
from kdlm.progress import Window
from kdlm.samples import SampleLog
from kdlm.signal import Rows
from kdlm.verifiers import Judge


class SummedEvaluation(Trainer):
    """The part of a `DistillTrainer` that evaluates, and that fits a teacher on evaluation rows."""

    networks: Networks
    method: Method
    teacher: Any
    _window: Window
    sample_log: SampleLog | None = None
    """Where what the student writes is written down."""
    _evaluation = EvaluationSection()
    _watch: Watch | None = None
    guards: CollapseGuards | None = None
    """What watches for collapse, and says what stopped the run."""

    def watch(self, section: EvaluationSection, *, other: Any = None, judge: Judge | None = None) -> None:
        """Evaluate as a section says. To be called before training: the student is then as it starts.

        Args:
            section: which rows, what is read on them, and which checkpoint is handed out in the end.
            other: rows of the other text that forgetting is measured on.
            judge: of the student's own completions, by what rows carry as `reference`.

        Raises ValueError, naming the key, where student or training arguments do not allow it.
        """
        section.settle(self.args)
        if section.generations is not None and cuts_weights(self.accelerator):
            raise ValueError(
                "evaluation.generations: under ZeRO-3 ranks cannot write texts of different length: use ZeRO-2, or "
                "leave it out"
            )
        self._evaluation = section
        if section.reads_text:
            refuse_with_slices(self.networks.student, "evaluation")
            nets, vocab = self.networks.views, getattr(self.method, "vocab", None)
            teacher = nets.get("teacher")
            self._watch = Watch(section, self, nets["student"], teacher, vocab=vocab, other=other, judge=judge)

    def guard(self, section: GuardsSection) -> None:
        """Watch for collapse as a section says. To be called before training: the student is then as it starts.

        Raises ValueError, naming the key, for what cannot be read in this run.
        """
        refuse_with_slices(self.networks.student, "guards")
        refuse_with_parts(self.accelerator, "guards")
        self.guards = CollapseGuards(self, section)
        self.add_callback(self.guards)

    def fit_teacher(self) -> None:
        """Let a teacher that learns something from evaluation rows do so: once, and the same on every rank.

        Called before the first step, and before an evaluation that comes earlier; a resumed run has it from its
        checkpoint. Raises ValueError without evaluation rows.
        """
        if not getattr(self.teacher, "needs_fit", False):
            return
        if self.eval_dataset is None:
            raise ValueError(f"{type(self.teacher).__name__} is fitted on evaluation rows, and there are none")
        with self.accelerator.autocast():
            self.teacher.fit(self._held_out(), getattr(self.method, "vocab", None))
        state = {name: value.to(self.args.device) for name, value in self.teacher.state_dict().items()}
        self.teacher.load_state_dict({name: broadcast(value).cpu() for name, value in state.items()})
        if hasattr(self.teacher, "readings"):
            self.log(self.teacher.readings())

    def _held_out(self) -> Iterator[tuple[dict[str, Tensor], Rows]]:
        """Yield the batches of all evaluation rows, the same on every rank, with their kept rows."""
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        own = torch.Generator()  # a loader draws a seed; the run's own numbers are left alone
        for rows in splits.values():
            loader = DataLoader(
                cast("Any", rows), self.args.eval_batch_size, collate_fn=self.data_collator, generator=own
            )
            for batch in loader:
                batch: Any = self._prepare_inputs(batch)
                read = batch["theirs"] if "chunks" in batch else batch  # a teacher with a tokenizer of its own
                yield read, kept_rows(read["labels"])

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Give each rank its share of the rows, none of them twice."""
        splits: Any = self.eval_dataset
        dataset: Any = splits if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = splits[dataset]
        if not hasattr(dataset, "__len__"):
            return super().get_eval_dataloader(eval_dataset)
        if any(dataset is own for own in (splits.values() if isinstance(splits, dict) else [splits])):
            dataset = self._evaluation.chosen(dataset)
        return share_of(dataset, self.args, self.data_collator, all_alike=tensor_parallel(self.networks.student) > 0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; the time it takes is not counted into the pace of training."""
        began = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self._window.began += time.perf_counter() - began
        return metrics

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sum every reading over all rows of all ranks, then divide: a long batch counts for what it holds.

        Rows that have weights count by them here as in training.
        """
        with getattr(self.teacher, "at_hand", nullcontext)():
            return self._summed(dataloader, metric_key_prefix)

    def _summed(self, dataloader: DataLoader, prefix: str) -> EvalLoopOutput:
        self.fit_teacher()
        self.networks.eval()
        step = self._step()
        sums: dict[str, Tensor] = defaultdict(partial(torch.zeros, (), dtype=torch.float64))  # on the CPU
        units: dict[str, str] = {}
        samples = 0
        for batch, counts in in_step(dataloader, self):
            batch = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                terms = self.networks.ask(partial(self.method.evaluate, self.networks.views, batch, step))
            readings = terms.readings()
            readings |= {f"loss/{name}": (term.weight * term.sum, term.unit) for name, term in terms.terms.items()}
            for name, (value, unit) in readings.items():
                sums[name], units[name] = sums[name] + (value.item() if counts else 0.0), unit
            for unit, count in counts_of(self.method, batch).items():
                sums[f"count/{unit}"] = sums[f"count/{unit}"] + count.item() * counts
            samples += len(next(iter(batch.values()))) * counts
        totals = {name: value.item() for name, value in self._reduced(dict(sums)).items()}
        means = {name: totals[name] / (totals[f"count/{unit}"] or 1.0) for name, unit in units.items()}
        loss = sum(value for name, value in means.items() if name.startswith("loss/"))
        others = {name: value for name, value in means.items() if not name.startswith("loss/")}
        metrics = {"loss": loss, **self.method.summarised(others)}
        if self._watch is not None and prefix == "eval":
            metrics |= self._watch.figures(dataloader, metrics)
        return EvalLoopOutput(
            predictions=None,  # pyright: ignore[reportArgumentType]  never kept: they would be [rows, vocab]
            label_ids=None,
            metrics={f"{prefix}_{name}": value for name, value in metrics.items()},
            num_samples=samples,
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = self._evaluation.best
        if wanted is not None and f"eval_{wanted}" not in metrics:
            known = [name.removeprefix("eval_") for name, value in metrics.items() if isinstance(value, float)]
            raise ValueError(f"evaluation.best: {unknown(wanted, known)}")
        return super()._determine_best_metric(metrics, trial)
