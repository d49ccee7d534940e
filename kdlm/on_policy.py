"""OnPolicyTrainer: a DistillTrainer whose student trains on text that it writes itself.

It adds what differs in the batch and the loop, and no loss: before a step it asks the rollouts for the student's
completions of the step's prompts, and lays them out as a batch beside or instead of the data's own answers.
"""

import copy
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from kdlm.data import ContextCollator
from kdlm.data.share import Share
from kdlm.data.turns import Between
from kdlm.deepspeed import cuts_weights
from kdlm.disk import write_text
from kdlm.methods.method import After, Method, Told
from kdlm.rollout_figures import RolloutFigures
from kdlm.rollouts import (
    Completion,
    Engine,
    Episodes,
    GenerateEngine,
    Opaque,
    Repeated,
    RolloutSection,
    Rounds,
    Row,
    Slot,
    Written,
    as_row,
    check_engine,
    context_of,
    describe,
    end_ids,
)
from kdlm.samples import Sample, described, look
from kdlm.sharding import whole_on_every_rank
from kdlm.teachers import LocalTeacher
from kdlm.trainer import Counts, DistillTrainer
from kdlm.verifiers import Judge

logger = logging.getLogger(__name__)

Reward = Callable[[Sequence[str], Sequence[Row]], Sequence[float]]
"""Texts of completions, and the rows whose prompts they follow -> one number each."""


class OnPolicyTrainer(DistillTrainer):
    """Trains a student on its own samples, on given data, or on both, as the method says step by step.

    A micro-batch holds `per_device_train_batch_size` prompts, and so that many times `samples_per_prompt` completions.

    Args:
        model, teacher, args, **options: as of `DistillTrainer`. Rows of `train_dataset` give the prompts: what comes
            before their last answer; a row may be a prompt alone (no label) where the method takes no data's text.
        rollouts: how completions are made; by default by `model.generate`, one for each prompt, for every step.
        engine: what makes them, instead of the one that `rollouts` names.
        reward: gives each completion a number, which is logged and handed to the method: any function, or a
            `kdlm.verifiers.Judge`, which compares it with what the rows carry as `reference`.
        chat_template_args: variables of the chat template, for what it writes between two turns.

    Raises ValueError when engine, rollouts and training arguments do not fit.
    """

    provides: ClassVar[frozenset[str]] = DistillTrainer.provides | {"rollouts", "reward", "turns", "informed"}

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: Any = None,
        *,
        rollouts: RolloutSection | None = None,
        engine: Engine | None = None,
        reward: Reward | Judge | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(model, teacher, args, **options)
        section = rollouts if rollouts is not None else RolloutSection()
        tokenizer: Any = self.processing_class
        if tokenizer is None:
            raise ValueError("processing_class: the student's tokenizer is needed, for its end token and to read text")
        if engine is None:
            check_engine(section, masked="unmasking" in self.method.needs)
            copied = section.asynchronous or cuts_weights(self.accelerator)
            engine = section.engine.build(self.student, tokenizer, self.args.device, copied=copied)
        if cuts_weights(self.accelerator):
            if not isinstance(engine, GenerateEngine) or engine.lives:
                raise ValueError("rollouts.engine: under ZeRO-3 a copy of the student writes, of the engine `generate`")
            engine.take(self.student, 0)  # which is whole until DeepSpeed has it
        if section.sampling.teacher_share:
            across = "alignment" in self.method.needs
            local = isinstance(self.teacher, LocalTeacher) and not self.teacher.in_shards
            if not isinstance(engine, GenerateEngine) or not local or across:
                raise ValueError(
                    "rollouts.sampling.teacher_share: it takes the engine `generate` and a local teacher with the "
                    "student's tokenizer, whole on every rank"
                )
            if getattr(self.teacher, "sliced", False):
                raise ValueError(
                    "rollouts.sampling.teacher_share: the teacher draws too: use teacher.placement: resident"
                )
            engine.guide = self.teacher.model
        check_provided(self.method, section, rewarded=reward is not None)
        self.reward, self.section = reward, section
        self._variables = chat_template_args
        self.rounds = Rounds(
            engine,
            section,
            seed=random.Random(f"{self.args.seed} {self.args.process_index}").getrandbits(31),
            text=lambda index: self.method.text(self._step(index), draw_of(self.args.seed, index)),
            student=lambda: self.student,
            finish=self._finish,
            last=lambda: self.state.max_steps,
            told=self._told,
            trained_on=self._trained_on,
            episodes=self._episodes(),
            informed=self._informed(),
        )
        self.samples: list[Sample] = []
        """The completions that were last looked at."""
        self.figures = RolloutFigures(section.environment)

    @cached_property
    def _between(self) -> Between:
        tokenizer: Any = copy.deepcopy(self.processing_class)  # used in the engine's thread
        role = "user" if self.section.environment is None else self.section.environment.role
        return Between(tokenizer, end_ids(self.student, tokenizer), role, self._variables)

    def _episodes(self) -> Episodes | None:
        """Return what completes prompts turn by turn; None where a completion is one turn."""
        environment = self.section.environment
        if environment is None:
            return None
        if "alignment" in self.method.needs:
            raise ValueError(
                "rollouts.environment: a teacher with another tokenizer reads one turn only: use one with the student's"
            )
        tokenizer: Any = copy.deepcopy(self.processing_class)  # used in the engine's thread
        return Episodes(
            environment,
            read=partial(tokenizer.batch_decode, skip_special_tokens=True),
            between=self._between,
            context=context_of(self.student),
            judge=None if self.reward is None else self._judged,
        )

    def _informed(self) -> Callable[[Row], list[int] | None] | None:
        """Return what writes the prompts that the student completes, where they are not the rows' own."""
        if not self.section.informed:
            return None
        collator = getattr(self.data_collator, "collate", self.data_collator)
        if not isinstance(collator, ContextCollator):
            raise ValueError("rollouts.informed: the data have nothing that prompts could hold: add data.context")
        return collator.told

    def close(self) -> None:
        super().close()
        self.rounds.close()
        if isinstance(self.reward, Judge):
            self.reward.close()

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        """Hand out rows, not batches: prompts are completed before they are laid out."""
        collator, self.data_collator = self.data_collator, Opaque
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if self.section.reuse == 1:
            return sampler
        if sampler is None:
            raise ValueError(
                "rollouts.reuse: a stream cannot be gone over again: use reuse: 1, or data.streaming: false"
            )
        args = self.args
        size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size * self.section.every
        return Repeated(sampler, size, self.section.reuse)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Counts]:
        """Return the micro-batches of the next optimiser step, with the student's text, and their counts."""
        index = self.state.global_step
        with whole_on_every_rank(self.networks):
            slot = self.rounds.step(epoch_iterator, num_batches, index)
        batches = [] if slot is None else [self._laid_out(slot, place) for place in range(len(slot.micro))]
        if slot is not None:
            written = [one for micro in slot.written for one in micro]
            self.figures.note(written)
            for one in written:
                self.figures.add("staleness", index - one.completion.version)
            if index % max(1, int(self.state.logging_steps)) == 0:
                self._look(written[: self.section.show], index)
        counts = self._get_num_items_in_batch(batches, device)
        self._announce(batches)
        return batches, counts

    def _laid_out(self, slot: Slot, place: int) -> dict[str, Tensor]:
        """Return one micro-batch: the data's rows, the student's, or the ones above the others."""
        data = slot.micro[place] if slot.text != "student" else []
        own = slot.written[place] if slot.written else []
        return self.batch_of(data, own)

    def batch_of(self, data: Sequence[Row], own: Sequence[Written]) -> dict[str, Tensor]:
        """Lay out rows of the data and the student's completions as one batch."""
        masked = self.section.truncated == "mask"
        rows = [*data, *(as_row(one, masked=masked and one.completion.stop == "length") for one in own)]
        batch: Any = self.data_collator(rows)
        return batch | describe(batch, rows, [*(None for _ in data), *own]) if own else batch

    def _finish(self, drawn: list[tuple[Row, list[int], Completion]]) -> list[Written]:
        """Read each completion as text, and ask what it is worth."""
        tokenizer: Any = self.processing_class
        texts = tokenizer.batch_decode([one.ids for _, _, one in drawn], skip_special_tokens=True)
        said: Sequence[tuple[float | None, str | None]] = [(None, None)] * len(drawn)
        if self.reward is not None:
            said = self._judged(texts, [row for row, _, _ in drawn])
        return [
            Written(*given, text, reward, feedback=reason)
            for given, text, (reward, reason) in zip(drawn, texts, said, strict=True)
        ]

    def _judged(self, texts: Sequence[str], rows: Sequence[Row]) -> list[tuple[float, str | None]]:
        """Ask the verifier, or whatever gives rewards: a number for each text, and what is said beside it."""
        if isinstance(self.reward, Judge):
            verdicts = self.reward.judge(texts, [row.get("reference") for row in rows])
            return [(one.score, one.reason if one.outcome == "judged" else None) for one in verdicts]
        return [(reward, None) for reward in cast("Reward", self.reward)(texts, rows)]

    def _told(self, written: list[Written]) -> list[Written]:
        """Add to each completion what the method has to tell the teacher about it."""
        told = self.method.told(written)
        if told is None:
            return written
        return [self._telling(one, more) for one, more in zip(written, told, strict=True)]

    def _trained_on(self, written: list[Written]) -> None:
        if type(self.method).trained_on is not Method.trained_on:
            self.method.trained_on(gather_object(written) if self.args.world_size > 1 else written)

    def _telling(self, one: Written, more: Told) -> Written:
        if isinstance(more, str):
            return replace(one, context=more)
        if isinstance(more, After):
            more = [*one.prompt, *one.completion.ids, *self._between(one.prompt, more.words)]
        return replace(one, context_prompt=more)

    # What is seen of it

    def _look(self, written: Sequence[Written], index: int) -> None:
        """Look at some completions token by token; warn of what should not be."""
        if not written:
            return
        batch: Any = self._prepare_inputs(self.batch_of([], written))  # pyright: ignore[reportArgumentType]
        drawn_with, vocab = self.section.sampling, getattr(self.method, "vocab", None)
        self.networks.eval()  # without dropout, as the engine draws; a training step switches it on again
        with self.accelerator.autocast():
            options = {"temperature": drawn_with.temperature or 1.0, "vocab": vocab}
            seen = self.networks.ask(partial(look, self.networks.views, batch, **options))
        plain = drawn_with.top_p == 1 and not drawn_with.top_k and not drawn_with.teacher_share
        plain = plain and not self.section.informed  # what is looked at was not read with what the engine was told
        if seen.gap is not None and plain and all(one.completion.version == index for one in written):
            self.figures.engine_gap(seen.gap)
        if index == 0 and "theirs" not in batch:  # who is told more is far away on purpose
            self.figures.apart(seen.mean)
        self.samples = described(written, seen, index, self.processing_class)
        if self.sample_log is not None and self.is_world_process_zero():
            self.sample_log.add(self.samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the completions since the last log line were like, and the seconds that were waited for them."""
        if "loss" in logs:
            self.figures.add("seconds_waiting", self.rounds.waited)
            self.rounds.waited = 0.0
            logs |= self.figures.taken("rollout/", self._reduced)
            if isinstance(self.reward, Judge):  # of this rank, since the run began
                logs |= {
                    f"rollout/verifier_{what}": float(self.reward.counts[what]) for what in ("raised", "timed_out")
                }
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ever; and, where it is asked for, on the student's own completions of evaluation prompts."""
        metrics = super().evaluate(*args, **kwargs)
        rows = self.eval_dataset if not args and "eval_dataset" not in kwargs else None
        if self.section.eval_prompts and rows is not None and not isinstance(rows, dict):
            own = self._evaluate_rollouts(rows)
            self.log(own)
            metrics |= own
        return metrics

    def _evaluate_rollouts(self, dataset: Any) -> dict[str, float]:
        rows = dataset.select(range(min(self.section.eval_prompts, len(dataset))))
        share = Share(rows, self.args.process_index, self.args.world_size)
        asked = [share[place] for place in range(len(share))]
        with whole_on_every_rank(self.networks):
            written = self.rounds.complete(asked, self.state.global_step, samples=1)
        size = self.args.eval_batch_size
        parts = [written[at : at + size] for at in range(0, len(written), size)]
        loader = DataLoader(cast("Any", parts), batch_size=None, collate_fn=lambda part: self.batch_of([], part))
        metrics = self.evaluation_loop(loader, "rollouts", metric_key_prefix="eval_rollout").metrics or {}
        figures = RolloutFigures(self.section.environment)
        figures.note(written)
        return metrics | figures.taken("eval_rollout_", self._reduced)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write into a checkpoint also, of each rank, the text that waits to be trained on."""
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            write_text(self._waiting(Path(output_dir or str(self.args.output_dir))), json.dumps(self.rounds.state()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._waiting(Path(resume_from_checkpoint))
        if file.is_file():
            self.rounds.load_state(json.loads(file.read_text()))
        else:
            logger.warning("%s: no waiting text of rank %d: it is made anew", file.parent, self.args.process_index)

    def _waiting(self, folder: Path) -> Path:
        return folder / f"rollouts_{self.args.process_index}.json"


def draw_of(seed: int, index: int) -> float:
    """Return the uniform number in [0, 1) of an optimiser step: the same on every rank."""
    return random.Random(f"{seed} text {index}").random()


def check_provided(method: Method, section: RolloutSection, *, rewarded: bool) -> None:
    """Raise ValueError, by its key, for what a method needs of the rollouts and is not there."""
    name, environment = type(method).__name__, section.environment
    rewarded |= environment is not None and not environment.judged
    if "reward" in method.needs and not rewarded:
        raise ValueError(f"{name} learns from rewards: hand over `reward`, or a verifier")
    if "informed" in method.needs and not section.informed:
        raise ValueError(f"rollouts.informed: {name} learns from a student that is told more")
    if "turns" in method.needs and environment is None:
        raise ValueError(f"rollouts.environment: missing; {name} learns from several turns")
