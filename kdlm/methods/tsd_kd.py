"""TSD-KD: on its own text the student is re-ranked where it opens, matched where it is unsure, and made certain."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import Selective, chunked, count_kept, entropy, kept_rows
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import count_sequences, group_rows, lay_out
from kdlm.methods.tokens import TokenMethod, TokenOptions, Weighted
from kdlm.signal import Dense, Hidden, Rows, Signal, sequence_of, weights_of


class TsdKD(TokenMethod):
    """Token-selective dual distillation on the student's own text (ICLR 2026, arXiv 2603.13260).

    For each sequence of L tokens, `indirect_weight * indirect + direct + entropy`, then the mean over sequences:

    - indirect: mean over the opener of `plackett_luce`, the teacher's order of the student's k candidates. The opener
      is the first tokens, at least one, up to where the student's cumulative entropy reaches `opener` of its sum;
    - direct: `1 / L` sum of `gated_jsd`, all tokens, more where the student is less certain than the teacher;
    - entropy: mean student entropy over the `uncertain` share of tokens where it is highest (rounded up), minimised.

    Every choice is made within a sequence, so that neither the batch nor how it was cut matters. This is the paper's
    objective; its released code differs where it picks the opener and the uncertain tokens over the flattened batch,
    keeps the 90% most uncertain ones, and ranks over prefixes, which raises the teacher's worst candidate. Averaging
    over the opener is the code's. Both models are compared at temperature 1 over the ids they share.

    It takes two passes over the student's logits: the first, without gradient, for the entropies that choose.

    Args:
        indirect_weight: weight of the ranking term (alpha).
        candidates: the student's most probable tokens that are ranked (k).
        opener: share of a sequence's entropy that its opener has (c).
        uncertain: share of a sequence's tokens whose entropy is minimised.
        beta: share of the teacher in the mixture of the divergence, GKD's sense.
        gate_temperature: divides the difference of entropies in the gate.
    """

    paper = "arXiv 2603.13260"
    needs = frozenset({"teacher", "rollouts"})
    weighs = True

    def __init__(
        self,
        losses=(),
        *,
        indirect_weight=0.1,
        candidates=10,
        opener=0.1,
        uncertain=0.1,
        beta=0.9,
        gate_temperature=1.0,
        **options,
    ):
        super().__init__(losses, **options)
        self.opener, self.uncertain = opener, uncertain
        self.selective: Any = Selective(indirect_weight, candidates, beta, gate_temperature)

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "student"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": count_kept(batch["labels"], weights_of(batch)), "sequences": count_sequences(batch)}

    def weighted(self, step: Step) -> list[Weighted]:
        """Name the loss, which says what signals it takes; it is summed by rows of unequal weight, see `losses`."""
        return [("tsd_kd", self.selective, 1.0)]

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        return self._select(nets["student"](batch, rows), nets["teacher"](batch, rows), rows, batch)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms on this text, and every measure that can be taken with this teacher."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        student, teacher = nets["student"](batch, rows), nets["teacher"](batch, rows)
        terms = self._select(student, teacher, rows, batch)
        return Terms(terms.terms, terms.metrics | self.measured(student, teacher, rows))

    def _select(self, student: Hidden | Dense, teacher: Signal, rows: Rows, batch: Batch) -> Terms:
        options: Any = {"vocab": self.vocab, "chunk_rows": self.chunk_rows, "impl": self.impl}
        with torch.no_grad():
            entropies = chunked(lambda logits, _: entropy(logits), student, None, **options)
            shares = self._shares(entropies, rows.of_labels(sequence_of(batch)))
        value, parts = chunked(self.selective, student, teacher, *shares, has_aux=True, **options)
        nothing = value.detach()[:0]  # without rows there are no parts; every rank must still report the same names
        names = ("indirect", "direct", "entropy")
        metrics = {name: (rows.sum(parts.get(name, nothing)), "sequences") for name in names}
        return Terms({"tsd_kd": Term(rows.sum(value), "sequences")}, metrics)

    def _shares(self, entropies: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the share of each row in the three means of its sequence."""
        group, lengths = group_rows(numbers)
        opener = opening(entropies, group, lengths, self.opener)
        uncertain = most_uncertain(entropies, group, lengths, self.uncertain)
        indirect, certainty = (_mean_over(chosen, group, entropies) for chosen in (opener, uncertain))
        return indirect, (1 / lengths[group]).to(entropies), certainty


def _mean_over(chosen: Tensor, group: Tensor, like: Tensor) -> Tensor:
    """Return `1 / n` on the chosen rows, n of them in the sequence, and 0 elsewhere."""
    chosen = chosen.to(like)
    return chosen / chosen.new_zeros(len(group)).index_add(0, group, chosen).clamp(min=1)[group]


def opening(entropies: Tensor, group: Tensor, lengths: Tensor, share: float) -> Tensor:
    """Return which rows `[rows]` come no later than the one with which the sum of entropies reaches `share` of all.

    Sums are those of the row's own sequence (see `lay_out`), whose first row is always in.
    """
    lines, place = lay_out(entropies.double(), group, lengths, 0.0)
    before = lines.cumsum(-1) - lines
    return (place == 0) | (before < share * lines.sum(-1, keepdim=True))[group, place]


def most_uncertain(entropies: Tensor, group: Tensor, lengths: Tensor, share: float) -> Tensor:
    """Return which rows `[rows]` are among the `share` of their sequence with most entropy, rounded up.

    Where entropies are equal the earlier row goes first.
    """
    lines, place = lay_out(entropies, group, lengths, -torch.inf)
    rank = lines.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank[group, place] < torch.ceil(lengths.double() * share - 1e-9)[group]


class TsdKDSection(TokenOptions):
    """Teach the student on its own text: rank its candidates where it opens, match it where it is less certain."""

    method: ClassVar = TsdKD
    name: Literal["tsd_kd"] = "tsd_kd"
    indirect_weight: float = Field(0.1, ge=0)
    """Weight of the ranking of the student's candidates by the teacher."""
    candidates: int = Field(10, ge=2)
    """How many of the student's most probable tokens are ranked."""
    opener: float = Field(0.1, gt=0, le=1)
    """Share of a sequence's entropy up to which its tokens are ranked."""
    uncertain: float = Field(0.1, gt=0, le=1)
    """Share of a sequence's tokens, the most uncertain ones, whose entropy is minimised."""
    beta: float = Field(0.9, ge=0, le=1)
    """Share of the teacher in the mixture of the divergence: 0 is forward KL, 1 reverse KL."""
    gate_temperature: float = Field(1.0, gt=0)
    """Divides the difference of entropies (student minus teacher) in the gate of the divergence."""

    def build(self, losses, vocab) -> TokenMethod:
        if losses:
            raise ValueError(f"losses: tsd_kd brings its own; leave out {', '.join(x.name for x in losses)}")
        return super().build(losses, vocab)
