"""DistiLLM-2: two divergences, one for the teacher's responses and one for the student's own."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.losses import SkewKL, SkewReverseKL, Weight, chunked, count_kept, kept_rows, value_at, weighted_sum
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import count_sequences, group_rows, sampled_in
from kdlm.methods.tokens import TokenMethod, TokenOptions, Weighted
from kdlm.signal import Dense, Hidden, Rows, Signal, sequence_of, summed, take, weights_of

SIDES = ("data", "student")
"""Whose responses; their units are `data_sequences` and `student_sequences`."""


class DistiLLM2(TokenMethod):
    """Skew KL on the teacher's responses and skew reverse KL on the student's own (ICML 2025, arXiv 2503.07067).

    `(2 - beta) mean SKL(teacher's responses) + beta mean SRKL(student's responses)`, each averaged over the tokens of
    a response and then over the responses of that side in the optimiser step. The first raises the student where the
    teacher has mass, the second lowers it where it alone has. The data must hold what the teacher wrote; the rollouts
    give the student's side. As published: one response of each to a prompt, both drawn at temperature 0.8, and the
    student's drawn anew once an epoch (`rollouts.every` as many steps as an epoch has). Fresher ones are nearer to the
    objective.

    With `curriculum` every response has its own skew, smaller where student and teacher are near:

        gap  = exp(mean log p) - exp(mean log q), over the response's tokens; with the sign changed on the student's
        skew = min(base, max(0.01, 1 - (1 - base) * anchor / (gap + 1e-5)))

    `anchor` is the mean gap of that side in the first optimiser step, which itself runs at the base skew. It costs a
    second pass over the logits, and wants a teacher that gives whole distributions.

    Two differences from the released code, on purpose: the student inside the mixture of skew reverse KL carries
    gradient, as in the paper's objective; and means are those of the whole optimiser step.

    Args:
        beta: weight of the student's side, at most 2. The gradual form goes from 1 to 1.5 in the first half of the run.
        skew: share of the other distribution in both mixtures.
        curriculum: give each response its own skew.
    """

    paper = "arXiv 2503.07067"
    needs = frozenset({"labels", "teacher", "rollouts"})
    weighs = True

    def __init__(self, losses=(), *, beta: Weight = 1.0, skew=0.1, curriculum=False, **options):
        super().__init__(losses, **options)
        self.beta, self.skew, self.curriculum = beta, skew, curriculum
        self.follows = ("data_gap", "student_gap") if curriculum else ()
        self.anchors = torch.full((2,), float("nan"))

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "both"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        sampled = sampled_in(batch)
        by_side = {"data_sequences": ~sampled, "student_sequences": sampled}
        tokens = {"tokens": count_kept(batch["labels"], weights_of(batch))}
        return tokens | {unit: count_sequences(batch, side) for unit, side in by_side.items()}

    def weighted(self, step: Step) -> list[Weighted]:
        beta = value_at(self.beta, step.progress, step.index)
        return [
            ("skew_kl", SkewKL(skew=self.skew), 2 - beta),
            ("skew_reverse_kl", SkewReverseKL(skew=self.skew), beta),
        ]

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        return self._contrast(nets["student"](batch, rows), nets["teacher"](batch, rows), rows, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms (on given text that is the data's side alone), and every measure."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        student, teacher = nets["student"](batch, rows), nets["teacher"](batch, rows)
        terms = self._contrast(student, teacher, rows, batch, step)
        return Terms(terms.terms, terms.metrics | self.measured(student, teacher, rows))

    def _contrast(self, student: Hidden | Dense, teacher: Signal, rows: Rows, batch: Batch, step: Step) -> Terms:
        sampled, numbers = rows.of_labels(sampled_in(batch)), rows.of_labels(sequence_of(batch))
        options = {"vocab": self.vocab, "chunk_rows": self.chunk_rows, "impl": self.impl}
        terms: dict[str, Term] = {}
        metrics: dict[str, tuple[Tensor, str]] = {}
        for number, (name, loss, weight) in enumerate(self.weighted(step)):
            # Each row is projected once, for the divergence of its side.
            index = (sampled if number else ~sampled).nonzero().squeeze(-1)
            ours, theirs, own = take(student, index), take(teacher, index), rows.take(index)
            group, lengths = group_rows(numbers[index])
            share = 1 / lengths[group]
            side = SIDES[number]
            if self.curriculum:
                gaps = self._gaps(ours, theirs, own.labels, group, lengths) * (-1 if number else 1)
                there = batch["weight"][numbers[index].unique()] if "weight" in batch else None
                metrics[f"{side}_gap"] = (summed(gaps, there), f"{side}_sequences")
                skew = self._skews(gaps, self.anchors[number].to(gaps))[group]
                value = chunked(_by_row(loss), ours, theirs, skew, weights=share, **options)
            else:
                value = chunked(loss, ours, theirs, weights=share, **options)
            terms[name] = Term(own.sum(value), f"{side}_sequences", weight)
        return Terms(terms, metrics)

    @torch.no_grad()
    def _gaps(self, ours: Any, theirs: Any, labels: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
        """Return the teacher's mean probability of each response minus the student's; means are geometric."""
        names = ("teacher_cross_entropy", "cross_entropy")
        options = {"vocab": self.vocab, "measures": names, "chunk_rows": self.chunk_rows, "impl": self.impl}
        _, nats = weighted_sum([], ours, theirs, labels, **options)
        sums = (nats[name].new_zeros(len(lengths)).index_add(0, group, nats[name]) for name in names)
        p, q = (torch.exp(-total / lengths) for total in sums)
        return p - q

    def _skews(self, gaps: Tensor, anchor: Tensor) -> Tensor:
        skews = (1 - (1 - self.skew) * anchor / (gaps + 1e-5)).clamp(0.01, self.skew)
        return torch.where(anchor.isnan(), self.skew, skews)

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        if self.curriculum:
            now = torch.stack([means[name].to(self.anchors) for name in self.follows])
            self.anchors = torch.where(self.anchors.isnan(), now, self.anchors)

    def state_dict(self) -> dict[str, Tensor]:
        return {"anchors": self.anchors} if self.curriculum else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.anchors = state.get("anchors", self.anchors)


def _by_row(loss: Any):
    """Return a skew divergence that takes the skew of each row."""
    return lambda student, teacher, skew: loss.divergence(student, teacher, skew=skew)


class DistiLLM2Section(TokenOptions):
    """Skew KL on teacher-written text and skew reverse KL on the student's own; brings its own losses."""

    method: ClassVar = DistiLLM2
    name: Literal["distillm2"] = "distillm2"
    beta: Weight = 1.0
    """Weight of the student's side, at most 2; the data's has 2 - beta. Gradual: {name: linear, start: 1, end: 1.5,
    until: 0.5}."""
    skew: float = Field(0.1, ge=0.01, lt=1)
    """Share of the teacher (data's side) or of the student (its own side) in the mixture that is compared with."""
    curriculum: bool = False
    """Give each response its own skew, between 0.01 and `skew`, smaller where student and teacher are near."""

    @model_validator(mode="after")
    def _at_most_two(self) -> "DistiLLM2Section":
        stated = [getattr(self.beta, field, 0.0) for field in ("level", "start", "end")]
        values = [self.beta] if isinstance(self.beta, int | float) else [*stated, *getattr(self.beta, "values", [])]
        if max(values) > 2:
            raise ValueError(f"beta must stay at most 2, got {max(values):g}: the data's side has weight 2 - beta")
        return self

    def build(self, losses, vocab) -> TokenMethod:
        if losses:
            raise ValueError(f"losses: distillm2 brings its own two; leave out {', '.join(x.name for x in losses)}")
        return super().build(losses, vocab)
