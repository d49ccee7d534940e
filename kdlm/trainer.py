"""DistillTrainer: the Hugging Face Trainer with a method in place of a loss.

Runs any method on given data. What differs from `transformers.Trainer`: the loss is a sum of named terms, each divided
by one global count of the whole optimiser step (so that micro-batches, padding, packing and ranks do not change the
gradient); several networks train under one optimiser, by role; evaluation weighs tokens, not batches
(`kdlm.evaluation`); checkpoints are sealed and hold the method's state (`kdlm.role_checkpoints`); ranks may hold shares
of everything (`kdlm.sharded_training`).
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from kdlm import deepspeed
from kdlm.cut_sequences import CutSequences, refuse_beside_parts
from kdlm.data import ContextCollator, PairCollator, Prefetched, collator_for
from kdlm.evaluation.summed import SummedEvaluation
from kdlm.losses import ForwardKL, kept_rows
from kdlm.matching import check_answers, check_needs, check_sides, common_vocab
from kdlm.methods import AlignedMethod, LogitKD, Method, Preparation, Step, Terms, TokenMethod
from kdlm.methods.method import phases
from kdlm.models import mask_id_of
from kdlm.networks import Networks, check_plan
from kdlm.parallelism import refuse_beside_slices, refuse_cuts, refuse_with_parts, refuse_with_slices
from kdlm.preparation import prepared_rows
from kdlm.progress import Window
from kdlm.role_checkpoints import RoleCheckpoints
from kdlm.router_balance import RouterBalance
from kdlm.samplers import DrawnRows
from kdlm.sharded_training import Counts, ShardedTraining
from kdlm.sparsity import SparsitySection
from kdlm.sparsity.masking import Masking
from kdlm.teachers import freeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistillTrainer(SummedEvaluation, DrawnRows, CutSequences, ShardedTraining, RoleCheckpoints):
    """Trains a student with a method.

    Args:
        model: the student: a causal language model (or a PEFT model around one), or the network that the method wants.
        teacher: a `kdlm.teachers.Teacher`, or a model to freeze; None for methods without one.
        method: what a step computes; by default forward KL to the teacher on the given text.
        args: `transformers.TrainingArguments`.
        train_dataset, eval_dataset: rows with `input_ids` and `labels` (unshifted; -100 where not trained on).
        processing_class: the student's tokenizer; saved with it, and its pad token pads batches.
        teacher_processing_class: the teacher's tokenizer, where it is another one: batches then hold both readings of
            the text, aligned (see `kdlm.data.two_readings`), for methods across tokenizers.
        data_collator: rows -> batch; by default `kdlm.data.Collator` of rows with `input_ids`, else `stacked`.
        **options: handed to `transformers.Trainer`.

    Raises ValueError when the method needs what the teacher does not provide.
    """

    provides: ClassVar[frozenset[str]] = frozenset(
        {"labels", "images", "texts", "samples", "pairs", "preferences", "visual"}
    )
    """What a method may need that is not the teacher's: data may hold any of these."""
    balance: RouterBalance | None = None
    """What keeps the routers of a mixture of experts in balance."""

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: TrainingArguments | None = None,
        *,
        method: Method | None = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        data_collator: Callable | None = None,
        **options: Any,
    ):
        self.method = method if method is not None else LogitKD([ForwardKL()])
        self.teacher = freeze(teacher) if isinstance(teacher, nn.Module) else teacher
        args = args if args is not None else TrainingArguments(output_dir="runs/distill", report_to="none")
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            # The last layers of a vision tower are often left out of what the language model reads.
            sees = hasattr(getattr(model, "config", None), "vision_config")
            args.ddp_find_unused_parameters = self.method.leaves_unused or sees
        if data_collator is None:
            data_collator = collator_for(options.get("train_dataset"), processing_class, teacher_processing_class)
        aligned = {"alignment"} if isinstance(data_collator, PairCollator) else set()
        told = {"context"} if isinstance(data_collator, ContextCollator) else set()
        masked = set() if mask_id_of(model) is None else {"unmasking"}
        check_needs(self.method, self.teacher, self.provides | aligned | told | masked)
        check_sides(self.method, options.get("train_dataset"), options.get("eval_dataset"))
        check_answers(self.teacher, options.get("train_dataset"), options.get("eval_dataset"))
        if args.deepspeed_plugin is not None:
            deepspeed.refuse(args, model)
        refuse_cuts(args, model)
        self.networks = Networks(model, self.method, self.teacher)
        refuse_beside_slices(args, self.networks, self.teacher, self.method.needs)
        refuse_beside_parts(args, self.networks, self.teacher, self.method, data_collator)
        if isinstance(self.method, TokenMethod) and self.method.vocab is None and not aligned:
            self.method.vocab = common_vocab(self.networks.views, processing_class)
        if isinstance(self.method, AlignedMethod) and isinstance(data_collator, PairCollator):
            self.method.introduce(*data_collator.spellings)
        if hasattr(self.teacher, "prefetch"):
            data_collator = Prefetched(data_collator, self.teacher.prefetch)
        super().__init__(
            model=cast("PreTrainedModel", self.networks),  # stands in for one, see Networks
            args=args,
            data_collator=data_collator,
            processing_class=processing_class,
            **options,
        )
        if hasattr(self.teacher, "to"):
            self.teacher.to(self.args.device)
        self._means: dict[str, Tensor] = defaultdict(partial(torch.zeros, ()))  # this rank's share of the step's means
        self._followed: dict[str, Tensor] = defaultdict(partial(torch.zeros, ()))  # as they are, and not logged
        self._count = torch.zeros(())  # of what is trained on in the step, by all ranks
        self._computed: set[str] = set()  # names of the terms that some step had
        self._window = Window(self.method.paced_by)
        self._prepared = type(self.method).prepare is Method.prepare
        self.add_callback(_AfterStep(self))

    @property
    def student(self) -> Any:
        """The model being trained, as it was handed in."""
        return self.networks.student

    @property
    def exported(self) -> Any:
        """The network that a finished run hands out: the student, or what the method says in its place."""
        return self.networks.module_of(self.method.exported)

    def sparsify(self, section: SparsitySection) -> None:
        """Prune the student as a section says, whatever the method. To be called before training.

        Raises ValueError, naming the key, where the run cannot be sparse.
        """
        self.sparsity = Masking(self, section)
        self.add_callback(self.sparsity)

    def balance_routers(self, weight: float) -> None:
        """Add a balance loss of a mixture of experts' routers, with this weight. To be called before training.

        Raises ValueError where the student is none, or sequences are cut: a rank would balance what it has of them.
        """
        refuse_with_parts(self.accelerator, "student.router_balance")
        self.balance = RouterBalance(self.networks.student, weight)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, after the method has prepared its rows."""
        self.prepare()
        return super().train(*args, **kwargs)

    def prepare(self) -> None:
        """Let the method make the rows that the run trains on (see `Method.prepare`): once, however often it trains.

        The main process makes them while the others wait, for as long as `ddp_timeout` lets them, and read them; with
        `save_on_each_node` one process of each node does.
        """
        if self._prepared:
            return
        if getattr(self.teacher, "in_shards", False):
            name = type(self.method).__name__
            raise ValueError(f"teacher.placement: {name} makes its rows on one rank, and a sharded teacher is of all")
        refuse_with_slices(self.student, type(self.method).__name__)
        self.networks.eval()
        context = Preparation(
            self.networks.views,
            self.train_dataset,
            self.data_collator,
            self.args.seed,
            self.args.device,
            self.args.eval_batch_size,
        )
        with self.args.main_process_first(local=self.args.save_on_each_node):
            rows = prepared_rows(self.method, context, Path(str(self.args.output_dir)))
        if rows is not None:
            self.train_dataset = rows
        self._prepared = True

    def close(self) -> None:
        """Let go of what a run holds beside its weights: the lines to a server, workers."""
        if hasattr(self.teacher, "close"):
            self.teacher.close()
        if self._watch is not None:
            self._watch.close()

    # One step

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Tensor]], Counts]:
        """Return the micro-batches of the next optimiser step and their counts; a teacher may answer them at once."""
        batches, counts = super().get_batch_samples(*args)
        self._announce(batches)
        return batches, cast("Counts", counts)

    def _announce(self, batches: list[dict[str, Tensor]]) -> None:
        """Tell a teacher that answers ahead of the micro-batches which they are."""
        if not hasattr(self.teacher, "answer_ahead"):
            return
        asked = []
        for batch in batches:
            read: Any = self._prepare_inputs(batch)
            read = read["theirs"] if "chunks" in read else read  # a teacher with a tokenizer of its own
            if read["labels"].dim() > 1:  # else classes of texts, and no token is predicted
                asked.append((read, kept_rows(read["labels"])))
        with self.accelerator.autocast():
            self.teacher.answer_ahead(asked)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Counts | None = None
    ) -> Any:
        """Run the method inside the wrapped module's forward; all but the last of its `Terms` go backward here."""
        if num_items_in_batch is None:
            raise ValueError("compute_loss needs the item counts of the whole optimiser step")
        if self.guards is not None:
            self.guards.note(inputs)
        step = self._step()
        advance = phases(partial(self.method.losses, self.networks.views, inputs, self._activate(step.index), step))
        advance = advance if self.balance is None else self.balance.beside(advance, inputs)
        while True:
            sums, terms = model(advance)
            terms = terms.given_out(sums)
            loss = self._reduce(terms, num_items_in_batch)
            if not terms.more:
                return (loss, None) if return_outputs else loss
            self._backward_within(loss)

    def _step(self, index: int | None = None) -> Step:
        """Return where the run stands, or will stand after `index` optimiser steps."""
        epoch, index = int(self.state.epoch or 0), self.state.global_step if index is None else index
        epochs = max(1, int(self.state.num_train_epochs or 1))
        return Step(index, max(1, self.state.max_steps), epoch, self.args.seed, epochs)

    def _reduce(self, terms: Terms, counts: Counts) -> Tensor:
        """Return the loss whose gradient, averaged over ranks, is that of the global mean."""
        counts = {unit: torch.where(count > 0, count, 1) for unit, count in counts.items()}  # weights may sum below 1
        loss = sum(term.weight * term.sum / counts[term.unit].to(term.sum.dtype) for term in terms.terms.values())
        for means, sums in ((self._means, terms.readings()), (self._followed, terms.followed)):
            for name, (value, unit) in sums.items():
                means[name] = means[name] + value.detach() / counts[unit]
        self._computed.update(terms.terms)
        self._count = counts[self.method.paced_by]
        return cast("Tensor", loss) * self.data_ranks  # data parallelism averages gradients; the count is global

    def _after_step(self) -> None:
        """Move what moves once per optimiser step: averages and the method's schedule."""
        step = self._step()
        wanted = {name: (self._means if name in self._means else self._followed)[name] for name in self.method.follows}
        means = self._reduced(wanted)
        self.networks.move_averages(self._active or frozenset(), step.index)
        self.networks.take_snapshots(step.index)
        self.method.stepped(step, means)
        self._window.add(self._means, self._count / self.data_ranks)
        self._means.clear()
        self._followed.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the named losses' means since the last log, and the pace in trained tokens per second."""
        if "loss" in logs and self._window.steps:
            logs |= self._window.readings(self._reduced) | {name: norm.item() for name, norm in self._norms.items()}
            self._window = Window(self.method.paced_by)
        super().log(logs, start_time)


class _AfterStep(TrainerCallback):
    began_at = 0

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_plan(self.trainer.method, state.max_steps)
        self.began_at = state.global_step
        if state.global_step and float(state.epoch).is_integer():  # saved with an epoch's last step, before it ended
            self.trainer.networks.take_snapshots()
        self.trainer.fit_teacher()
        self.trainer._window = Window(self.trainer.method.paced_by)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.networks.take_snapshots()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        method, never = self.trainer.method, sorted(set(self.trainer.method.computes) - self.trainer._computed)
        if never and self.began_at == 0 and state.global_step == state.max_steps:
            raise ValueError(f"{type(method).__name__}: the term {never[0]!r} was not computed in any step of the run")
