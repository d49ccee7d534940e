"""DrawnRows: the part of a `DistillTrainer` that trains on the rows that a sampler draws."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import Trainer, TrainerCallback

from kdlm.data import Prefetched
from kdlm.evaluation.comparison import possible
from kdlm.evaluation.watch import share_of
from kdlm.measuring import Reader
from kdlm.methods import AlignedMethod, Method
from kdlm.models import Predictor
from kdlm.networks import Networks
from kdlm.parallelism import refuse_with_parts, refuse_with_slices
from kdlm.progress import Window
from kdlm.samplers.ddk import DomainGaps, DomainOrder, gaps_of
from kdlm.samplers.order import Order, selected


class DrawnRows(Trainer):
    """The part of a `DistillTrainer` that chooses its training rows."""

    networks: Networks
    method: Method
    teacher: Any
    _window: Window
    order: Order | None = None
    """What gives the rows of an epoch, once training has begun; None where that is each of them once."""
    _drawn_by: Any = None
    _documents: Any = None
    _order_state: Mapping[str, Tensor] | None = None  # of the checkpoint that is gone on from

    def draw(self, section: Any, *, documents: Any = None, names: Mapping[int, str] | None = None) -> None:
        """Draw training rows as a section of `kdlm.samplers` says. To be called before training.

        Args:
            section: of which rows an epoch is made.
            documents: of which document the sequence of each `index` is a piece (`Data.documents["train"]`), so that
                no document is both measured and trained on.
            names: what to call the domains in the log, by number (`kdlm.signal.domain_id`).

        Raises ValueError, naming the key, where data, teacher or training arguments do not allow it.
        """
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError("sampler: a stream has no rows to choose from: use data.streaming: false")
        refuse_with_slices(self.networks.student, "sampler")
        refuse_with_parts(self.accelerator, "sampler")
        if hasattr(self, "privacy"):
            raise ValueError("sampler: DP-SGD draws rows by chance, which its promise rests on")
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            raise ValueError("training.train_sampling_strategy: `sampler` says which rows are drawn: leave it out")
        if isinstance(section, DomainGaps):
            self._check_gaps()
            self.add_callback(_Gaps(self, names or {}))
        self._drawn_by, self._documents = section, documents

    def _check_gaps(self) -> None:
        if self.args.max_steps <= 0:
            raise ValueError("training.max_steps: missing; with ddk an epoch is the steps between two measurements")
        student, kinds = self.networks.views["student"], getattr(self.teacher, "signals", frozenset())
        if not isinstance(student, Predictor) or student.mask_id is not None or isinstance(self.method, AlignedMethod):
            raise ValueError("sampler: ddk compares perplexities of causal language models with one tokenizer")
        if self.teacher is None or any("teacher_cross_entropy" not in possible(kind) for kind in kinds):
            raise ValueError("sampler: ddk takes a teacher that says how likely it finds every token")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._drawn_by is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        more = {}
        if isinstance(self._drawn_by, DomainGaps):
            size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            more = {"per_step": size, "documents": self._documents}
        order: Order = self._drawn_by.order(rows, self.args.seed, **more)
        order.epoch = lambda: int(self.state.epoch or 0)
        self.order = order
        return order

    def measured_gaps(self) -> np.ndarray:
        """Return PPL_student / PPL_teacher on the slice of each domain, the same on every rank.

        The teacher is asked once: the slices stay what they are.
        """
        began, order = time.perf_counter(), self.order
        assert isinstance(order, DomainOrder)
        first, nets = order.teacher is None, self.networks.views
        names = ("cross_entropy", "teacher_cross_entropy") if first else ("cross_entropy",)
        vocab = getattr(self.method, "vocab", None)
        reader = Reader(nets["student"], nets.get("teacher") if first else None, names=names, vocab=vocab)
        self.networks.eval()  # a training step switches dropout on again
        sums = torch.stack([self._measured(reader, names, places) for places in order.slices.values()])
        sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        means = broadcast(sums[:, 1:] / sums[:, :1].clamp(min=1)).cpu().numpy()
        if first:
            order.teacher = means[:, 1]
        self._window.began += time.perf_counter() - began
        return gaps_of(means[:, 0], order.teacher)  # pyright: ignore[reportArgumentType]

    def _measured(self, reader: Reader, names: tuple[str, ...], places: np.ndarray) -> Tensor:
        """Return this rank's tokens of some rows, and the sum of each measure over them."""
        collate: Any = self.data_collator
        if reader.teacher is None and isinstance(collate, Prefetched):
            collate = collate.collate
        sums = torch.zeros(1 + len(names), dtype=torch.float64)
        for batch in share_of(selected(self.train_dataset, places), self.args, collate):
            with self.accelerator.autocast():
                read = self.networks.ask(partial(reader, self._prepare_inputs(batch)))
            sums += torch.stack([torch.tensor(float(len(read.rows))).double(), *(read.values[n].sum() for n in names)])
        return sums


class _Gaps(TrainerCallback):
    """Measures the gaps when an epoch of `ddk` begins, before its checkpoint is written; logs what came of it."""

    def __init__(self, trainer: DrawnRows, names: Mapping[int, str]):
        self.trainer, self.names = trainer, names

    @property
    def order(self) -> Any:
        return self.trainer.order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._order_state is not None:
            self.order.load_state_dict(self.trainer._order_state)
            self.trainer._order_state = None
        else:
            self._take(self.order.begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.order.every == 0:
            self._take(self.order.advance)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if done := state.global_step % self.order.every:
            self.trainer.log(self._by_domain(samples=self.order.counts(done)))

    def _take(self, take: Callable[[np.ndarray], None]) -> None:
        gaps = self.trainer.measured_gaps()
        take(gaps)
        order = self.order
        passes = order.taken / np.array([len(pool) for pool in order.pools.values()])
        self.trainer.log(self._by_domain(gap=gaps, share=order.shares, samples=order.taken, passes=passes))

    def _by_domain(self, **figures: np.ndarray) -> dict[str, float]:
        called = [self.names.get(number, f"{number % 2**64:016x}") for number in self.order.pools]
        return {
            f"{what}/{name}": float(value)
            for what, values in figures.items()
            for name, value in zip(called, values, strict=True)
        }
