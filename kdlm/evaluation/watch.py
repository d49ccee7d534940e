"""Watch: what a recipe's section `evaluation` asks for, read at every evaluation of any Trainer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdlm.data.share import Share
from kdlm.evaluation.comparison import figures_of, gap_closed, sums_of
from kdlm.evaluation.generations import Writer
from kdlm.evaluation.section import EvaluationSection
from kdlm.evaluation.start import Start
from kdlm.models import Predictor
from kdlm.verifiers import Judge


class Watch:
    """Reads the metrics of a section on evaluation rows, alike on every rank.

    Made before training begins: this is when the student is as it starts.

    Args:
        section: what to read.
        trainer: whose evaluation it is.
        student: the student as methods call it.
        teacher: gives a signal of `(batch, rows)`; None without one.
        vocab: ids that both share.
        other: the rows of the section's other text.
        judge: of the student's own completions.

    Raises ValueError, naming the key, for what this student cannot give.
    """

    def __init__(
        self,
        section: EvaluationSection,
        trainer: Any,
        student: Any,
        teacher: Any = None,
        *,
        vocab: Any = None,
        other: Any = None,
        judge: Judge | None = None,
    ):
        if not isinstance(student, Predictor):
            raise ValueError("evaluation: beside rows and best it asks for what only a language model has")
        self.section, self.trainer, self.student, self.teacher, self.vocab = section, trainer, student, teacher, vocab
        self.start = Start(student.module) if section.start else None
        self.other = None if other is None else section.chosen(other)
        self.writer: Writer | None = None
        if section.generations is not None:
            rows, tokenizer = section.chosen(trainer.eval_dataset), trainer.processing_class
            self.writer = Writer(section.generations, rows, student.module, tokenizer, trainer.args, judge)

    def figures(self, loader: Iterable[Any], known: Mapping[str, float]) -> dict[str, float]:
        """Return what is asked for on the rows of a loader, beside what is `known` of them already."""
        names = tuple(name for name in self.section.measures if name not in known)
        found: dict[str, float] = {}
        if names or self.start is not None:
            found |= self.read(loader, names)
        if self.other is not None:
            told = self._summed(self._loader(self.other), ("cross_entropy",), None)
            found |= {f"other_{name}": told[name] for name in ("cross_entropy", "kl_to_start") if name in told}
        if self.section.gap_closed is not False:
            found["gap_closed"] = self._gap_closed({**known, **found})
        return found | (self.writer.figures() if self.writer is not None else {})

    def read(self, loader: Iterable[Any], names: tuple[str, ...] | None) -> dict[str, float]:
        """Return metrics by name; None for those that evaluation watches by default with this teacher."""
        told = self._summed(loader, names, None if names == () else self.teacher)
        return told if names is None else {name: told[name] for name in (*names, "kl_to_start") if name in told}

    def _summed(self, loader: Iterable[Any], names: tuple[str, ...] | None, teacher: Any) -> dict[str, float]:
        trainer, sums = self.trainer, dict[str, Tensor]()
        for batch in loader:
            batch = trainer._prepare_inputs(batch)
            with trainer.accelerator.autocast():
                read = sums_of(batch, self.student, teacher, self.start, names=names, vocab=self.vocab)
            sums = {name: value.cpu() + sums[name] if sums else value.cpu() for name, value in read.items()}
        return figures_of(_reduced(sums, trainer.accelerator))

    def _loader(self, rows: Any) -> DataLoader:
        return share_of(rows, self.trainer.args, self.trainer.data_collator)

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


def share_of(rows: Any, args: Any, collator: Any) -> DataLoader:
    """Return batches of this rank's share of the rows, none of them twice."""
    if args.world_size > 1:
        rows = Share(rows, args.process_index, args.world_size)
    return DataLoader(rows, batch_size=args.eval_batch_size, collate_fn=collator)


def _reduced(sums: dict[str, Tensor], accelerator: Any) -> dict[str, Tensor]:
    """Sum every value over the ranks, in one message."""
    if accelerator.num_processes == 1:
        return sums
    names = sorted(sums)
    flat = torch.cat([sums[name].flatten() for name in names]).to(accelerator.device)
    parts = accelerator.reduce(flat, reduction="sum").cpu().split([sums[name].numel() for name in names])
    return {name: part.view_as(sums[name]) for name, part in zip(names, parts, strict=True)}
