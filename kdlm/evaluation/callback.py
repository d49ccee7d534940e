"""DistillationEvaluation: the evaluation of a recipe, for any Trainer, as a callback."""

from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback

from kdlm.evaluation.comparison import by_default
from kdlm.evaluation.section import EvaluationSection
from kdlm.evaluation.watch import Watch, share_of
from kdlm.matching import common_vocab
from kdlm.models import view
from kdlm.teachers import freeze
from kdlm.verifiers import Judge


class DistillationEvaluation(TrainerCallback):
    """Adds metrics of a student beside its teacher to every evaluation of a `Trainer` that trains a language model.

    They are logged as `eval_kl_to_teacher` and the like, and `metric_for_best_model` may name them. The rows are those
    that the Trainer itself evaluates, with its labels and its collator. `DistillTrainer` has all this of its own:
    see its `watch`.

    Args:
        trainer: of transformers or TRL, before it trains: the student is now as it starts.
        teacher: a model, which is frozen; a `kdlm.teachers.Teacher`; or None.
        section: what to read beside the default, of how many rows; `best` sets the Trainer's arguments.
        vocab: the number of ids that both tokenizers share, or these ids; by default the Trainer's tokenizer's where
            the heads are of different size.
        other: rows of another text, on which forgetting is measured too.
        judge: of the student's completions, by what rows carry as `reference`.

    Raises ValueError, naming the key, where student or training arguments do not allow it.
    """

    def __init__(
        self,
        trainer: Trainer,
        teacher: Any = None,
        section: EvaluationSection | None = None,
        *,
        vocab: Any = None,
        other: Any = None,
        judge: Judge | None = None,
    ):
        section = EvaluationSection() if section is None else section
        section.settle(trainer.args)
        if isinstance(teacher, nn.Module):
            teacher = freeze(teacher)
        if hasattr(teacher, "to"):
            teacher.to(trainer.args.device)
        student = view(cast("nn.Module", trainer.model))
        if vocab is None:
            vocab = common_vocab({"student": student, "teacher": teacher}, trainer.processing_class)
        self.trainer, self.section = trainer, section
        options = {"more": by_default(teacher), "vocab": vocab, "other": other, "judge": judge}
        self.watch = Watch(section, trainer, student, teacher, **options)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        prefix = next(name for name in metrics if name.endswith("_runtime")).removesuffix("runtime")
        loader = kwargs["eval_dataloader"]
        rows = share_of(self.section.chosen(loader.dataset), args, loader.collate_fn)
        found = self.watch.figures(rows, {}) if prefix == "eval_" else self.watch.read(rows, self.watch.names)
        named = {f"{prefix}{name}": value for name, value in found.items()}
        metrics |= named  # what chooses the best checkpoint looks here
        self.trainer.log(named)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.close()
