"""Watch: what a recipe's section `evaluation` asks for, read at every evaluation of any Trainer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from kdlm.data.share import Share
from kdlm.evaluation.comparison import figures_of, ingredients, possible, refusal, sums_of
from kdlm.evaluation.generations import Writer
from kdlm.evaluation.in_step import in_step
from kdlm.evaluation.section import EvaluationSection
from kdlm.evaluation.start import start_of
from kdlm.measuring import Reader
from kdlm.metrics import gap_closed
from kdlm.models import Predictor
from kdlm.sharding import whole_on_every_rank
from kdlm.verifiers import Judge


class Watch:
    """Reads the metrics of a section on evaluation rows, alike on every rank.

    Made before training begins: this is when the student is as it starts.

    Args:
        section: what to read.
        trainer: whose evaluation it is.
        student: the student as methods call it.
        teacher: gives a signal of `(batch, rows)`; None without one.
        more: metrics to read beside those of the section.
        vocab: ids that both share.
        other: the rows of the section's other text.
        judge: of the student's own completions.
        start: the student as it began, where it is known already.

    Raises ValueError, naming the key, for what this student and this teacher cannot give.
    """

    def __init__(
        self,
        section: EvaluationSection,
        trainer: Any,
        student: Any,
        teacher: Any = None,
        *,
        more: Sequence[str] = (),
        vocab: Any = None,
        other: Any = None,
        judge: Judge | None = None,
        start: Predictor | None = None,
    ):
        if not isinstance(student, Predictor) or student.mask_id is not None:
            raise ValueError("evaluation: beside rows and best it asks for what only a causal language model has")
        self.section, self.trainer, self.student, self.teacher = section, trainer, student, teacher
        self.names = tuple(dict.fromkeys([*more, *section.measures]))
        kinds = {None} if teacher is None else getattr(teacher, "signals", frozenset())
        for name in self.names if kinds else ():
            if name not in (known := dict.fromkeys(one for kind in kinds for one in possible(kind))):
                raise ValueError(f"evaluation.measures: {refusal(name, known)}")
        if start is None and section.start:
            start = start_of(student.module, trainer.args.device)
        self.start = start
        self.options: dict[str, Any] = {"start": self.start, "tokenizer": spelt_by(trainer.processing_class)}
        self.vocab = vocab
        self.other = None if other is None else section.chosen(other)
        self.writer: Writer | None = None
        if section.generations is not None:
            rows, tokenizer = section.chosen(trainer.eval_dataset), trainer.processing_class
            self.writer = Writer(section.generations, rows, student.module, tokenizer, trainer.args, judge)

    def figures(self, loader: Iterable[Any], known: Mapping[str, float]) -> dict[str, float]:
        """Return what is asked for on the rows of a loader, beside what is `known` of them already."""
        found = self.read(loader, tuple(name for name in self.names if name not in known))
        if self.other is not None:
            rows = share_of(self.other, self.trainer.args, self.trainer.data_collator)
            found |= {f"other_{name}": value for name, value in self.read(rows, ("cross_entropy",), None).items()}
        if self.section.gap_closed is not False:
            found["gap_closed"] = self._gap_closed({**known, **found})
        if self.writer is None:
            return found
        log = getattr(self.trainer, "sample_log", None) if self.trainer.is_world_process_zero() else None
        with whole_on_every_rank(self.trainer.networks) if hasattr(self.trainer, "networks") else nullcontext():
            return found | self.writer.figures(self.trainer.state.global_step, log)

    def _inside(self, ask: Callable[[], Any]) -> Any:
        """Ask inside the parent of all networks, which gathers them where they are sharded."""
        return self.trainer.networks.ask(ask) if hasattr(self.trainer, "networks") else ask()

    def read(self, loader: Iterable[Any], names: tuple[str, ...], teacher: Any = ...) -> dict[str, float]:
        """Return metrics by name, and `kl_to_start` where it is asked for; `teacher` in place of the run's."""
        if not names and self.start is None:
            return {}
        teacher = (self.teacher if names else None) if teacher is ... else teacher
        reader = Reader(self.student, teacher, names=ingredients(names), vocab=self.vocab, **self.options)
        sums: dict[str, Tensor] = {}
        for batch, counts in in_step(loader, self.trainer):
            batch = self.trainer._prepare_inputs(batch)
            with self.trainer.accelerator.autocast():
                read = sums_of(self._inside(partial(reader, batch)))
            read = read if counts else {name: torch.zeros_like(value) for name, value in read.items()}
            sums = {name: value + sums[name] if sums else value for name, value in read.items()}
        told = figures_of(_reduced(sums, self.trainer.accelerator))
        return {name: told[name] for name in (*names, "kl_to_start") if name in told}

    def _gap_closed(self, figures: Mapping[str, float]) -> float:
        if "teacher_cross_entropy" not in figures:
            raise ValueError("evaluation.gap_closed: this teacher does not say how likely it finds every label")
        began = self.section.gap_closed
        if began is True:
            began = figures["cross_entropy"] if self.trainer.state.global_step == 0 else self._at_start()
        return gap_closed(began, figures["cross_entropy"], figures["teacher_cross_entropy"])

    def _at_start(self) -> float:
        """Return the student's cross-entropy at step 0, which a resumed run has from its checkpoint."""
        for logs in self.trainer.state.log_history:
            if logs["step"] == 0 and "eval_cross_entropy" in logs:
                return logs["eval_cross_entropy"]
        raise ValueError("evaluation.gap_closed: no evaluation at step 0 is known: give the baseline's cross-entropy")

    def close(self) -> None:
        """Let go of what writes and judges."""
        if self.writer is not None:
            self.writer.close()


def spelt_by(processing_class: Any) -> Any:
    """Return the tokenizer of a Trainer, whose bytes can be counted; None where it has none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def share_of(rows: Any, args: Any, collator: Any, *, all_alike: bool = False) -> DataLoader:
    """Return batches of this rank's share of the rows, none of them twice; or of all rows, where ranks read alike."""
    if args.world_size > 1 and not all_alike:
        rows = Share(rows, args.process_index, args.world_size)
    own = torch.Generator()  # a loader draws a seed; the run's own numbers are left alone
    return DataLoader(rows, batch_size=args.eval_batch_size, collate_fn=collator, generator=own)


def _reduced(sums: dict[str, Tensor], accelerator: Any) -> dict[str, Tensor]:
    """Sum every value over the ranks, in one message."""
    if accelerator.num_processes == 1:
        return sums
    names = sorted(sums)
    flat = torch.cat([sums[name].flatten() for name in names]).to(accelerator.device)
    parts = accelerator.reduce(flat, reduction="sum").cpu().split([sums[name].numel() for name in names])
    return {name: part.view_as(sums[name]) for name, part in zip(names, parts, strict=True)}
