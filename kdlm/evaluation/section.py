"""What a recipe says about evaluation while the student trains."""

from collections.abc import Collection
from difflib import get_close_matches
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdlm.data import Source
from kdlm.metrics import METRICS
from kdlm.section import Section

if TYPE_CHECKING:
    from transformers import TrainingArguments


class Generations(Section):
    """Completions of evaluation prompts, written by the student at every evaluation."""

    prompts: int = Field(16, ge=1)
    """How many prompts are completed: the first of the evaluation rows."""
    max_new_tokens: int = Field(128, ge=1)
    """A completion that reaches this many tokens without its end is cut there."""
    temperature: float = Field(0.0, ge=0)
    """Divides the logits before a token is drawn; at 0 the most probable one is taken, whatever the ranks."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Plain text has no prompt: so many of its first tokens are taken for one."""


class EvaluationSection(Section):
    """What is evaluated while the student trains, on which rows, and which checkpoint is handed out. `training` says
    when: `eval_strategy`, `eval_steps`, `eval_on_start`."""

    rows: int | None = Field(None, ge=1)
    """At most so many of the evaluation rows, drawn once: the same at every evaluation and on any number of ranks."""
    seed: int = 0
    """Which rows those are. Not the run's seed, so that runs of different seeds share them."""
    measures: list[str] = []
    """What is read of student and teacher beside the method's own figures, e.g. [reverse_kl_to_teacher, ece]."""
    start: bool = False
    """Measure forgetting: `kl_to_start`, KL(start || student) to the student as it began. A frozen copy of it is kept,
    but for LoRA, whose base it is."""
    other: list[Source] | None = Field(None, min_length=1)
    """Text on which forgetting is measured too: `other_cross_entropy`, and with `start` also `other_kl_to_start`."""
    gap_closed: bool | float = False
    """Report how much of the way from the student's cross-entropy at step 0 to the teacher's is gone; a number stands
    in for the former, e.g. that of a student trained without teacher."""
    generations: Generations | None = None
    """Let the student write: `length`, `truncated`, `repetition_4`, `distinct_1`, `distinct_2`, and with a verifier its
    `score`."""
    best: str | None = None
    """Hand out the checkpoint at which this metric was best, and not the last one: any that evaluation reports."""

    def chosen(self, rows: Any) -> Any:
        """Return the rows that are evaluated, in their order."""
        if self.rows is None or len(rows) <= self.rows:
            return rows
        places = sorted(Random(self.seed).sample(range(len(rows)), self.rows))
        return rows.select(places) if hasattr(rows, "select") else [rows[place] for place in places]

    @property
    def reads_text(self) -> bool:
        """Whether it asks for what only a language model has."""
        return bool(self.measures or self.start or self.other or self.gap_closed is not False or self.generations)

    def settle(self, args: "TrainingArguments") -> None:
        """Set what follows from this section in the Trainer's arguments.

        Raises ValueError, naming the key, where they say otherwise.
        """
        if self.gap_closed is True:
            args.eval_on_start = True
        if self.best is None:
            return
        if args.eval_strategy == "no":
            raise ValueError(
                "training.eval_strategy: evaluation.best chooses among evaluations, and there are none while training: "
                "set eval_strategy: steps and eval_steps"
            )
        if args.metric_for_best_model not in (None, metric := f"eval_{self.best}"):
            raise ValueError(
                f"training.metric_for_best_model: {args.metric_for_best_model} is not evaluation.best, {self.best}: "
                "keep evaluation.best alone"
            )
        _save_where_it_evaluates(args)
        args.greater_is_better = self._higher(args.greater_is_better)
        args.metric_for_best_model, args.load_best_model_at_end = metric, True

    def _higher(self, said: bool | None) -> bool:
        if said is not None:
            return said
        better = METRICS[self.best].better if self.best in METRICS else 0
        if not better:
            raise ValueError(
                f"evaluation.best: of {self.best} neither more nor less is known to be better: say which by "
                "training.greater_is_better, or take another metric"
            )
        return better > 0


def _save_where_it_evaluates(args: "TrainingArguments") -> None:
    """Let every evaluation have its checkpoint: only one that was saved can be taken back."""
    if args.save_strategy == "best":
        return
    default = args.save_strategy == "steps" and args.save_steps == 500
    if args.save_strategy != args.eval_strategy and not default:
        raise ValueError(
            f"training.save_strategy: {args.save_strategy.value}, but evaluation.best takes a checkpoint at every "
            f"evaluation: leave it out, or set {args.eval_strategy.value} or best"
        )
    if args.eval_strategy == "steps" and not default and args.save_steps != args.eval_steps:
        raise ValueError(
            f"training.save_steps: {args.save_steps:g}, but evaluation.best takes a checkpoint at every evaluation, "
            f"each {args.eval_steps:g} steps: leave it out"
        )
    args.save_strategy = type(args.save_strategy)(args.eval_strategy.value)
    args.save_steps = args.eval_steps if args.eval_strategy == "steps" else args.save_steps


def unknown(metric: str, known: Collection[str]) -> str:
    """Return what to say of a metric that is none of those there are."""
    close = get_close_matches(metric, sorted(known), n=1)
    return f"{metric!r} is not reported{f', did you mean {close[0]}?' if close else '.'} There are {', '.join(known)}"
