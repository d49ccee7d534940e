"""REDI: right traces of a teacher are raised, wrong ones lowered by less, without a reference model."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import CrossEntropy, count_kept, kept_rows, measures_for, weighted_sum
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import count_sequences, group_rows
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import IGNORE_INDEX, Dense, Hidden, Rows, sequence_of, weights_of


class REDI(TokenMethod):
    """Reinforcement distillation's second stage, on pairs of a right and a wrong trace (arXiv 2505.24850).

    `mean over pairs of  -log q(chosen) / |chosen| + alpha log q(rejected) / |rejected|`, of sums over tokens and their
    numbers. The first stage is `sequence_kd` on right traces. At alpha 0 this is fine-tuning on the chosen side; at 1
    both sides pull alike, and the likelihood of either falls.

    The second term has no lower bound. Watch `chosen_log_prob` (nats a token), and stop when it falls: `guards` with
    `chosen_nll` do.

    Args:
        alpha: weight of the rejected side.
        others: as of `TokenMethod`.
    """

    paper = "arXiv 2505.24850"
    needs = frozenset({"labels", "preferences"})
    weighs = True

    def __init__(self, losses=(), *, alpha: float = 0.8, **options):
        if losses:
            raise ValueError(f"losses: redi brings its own; leave out {', '.join(loss.name for loss in losses)}")
        super().__init__(losses, **options)
        self.alpha = alpha

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        weights, chosen = weights_of(batch), batch["labels"].masked_fill(_rejected(batch), IGNORE_INDEX)
        return {
            "tokens": count_kept(batch["labels"], weights),
            "chosen_tokens": count_kept(chosen, weights),
            "pairs": count_sequences(batch, ~_rejected(batch)),
        }

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        return self._contrast(nets["student"](batch, rows), rows, batch)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own loss, and the measures of the chosen side alone."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        return self._contrast(nets["student"](batch, rows), rows, batch, measures_for(None))

    def _contrast(self, student: Hidden | Dense, rows: Rows, batch: Batch, measures: Sequence[str] = ()) -> Terms:
        rejected = rows.of_labels(_rejected(batch))
        group, lengths = group_rows(rows.of_labels(sequence_of(batch)))
        terms = [("cross_entropy", CrossEntropy(), 1.0)]
        options = {"vocab": self.vocab, "measures": measures, "chunk_rows": self.chunk_rows, "impl": self.impl}
        nats, found = weighted_sum(terms, student, None, rows.labels, **options)
        share = nats / lengths[group]
        loss = rows.sum(torch.where(rejected, -self.alpha * share, share))
        sides = {"chosen_log_prob": ~rejected, "rejected_log_prob": rejected}
        metrics = {name: (-rows.sum(share.detach() * side), "pairs") for name, side in sides.items()}
        metrics |= {name: (rows.sum(found[name] * ~rejected), "chosen_tokens") for name in measures}
        return Terms({"redi": Term(loss, "pairs")}, metrics)


def _rejected(batch: Batch) -> Tensor:
    """Return which tokens are of a rejected sequence, `[batch, length]`. Raises ValueError without pairs."""
    if "rejected" not in batch:
        raise ValueError("redi: the data have no pairs: rows need prompt, chosen and rejected")
    return batch["rejected"][sequence_of(batch)]


class REDISection(TokenOptions):
    """Raise the chosen side of every pair and lower the rejected one, each in mean over its tokens."""

    method: ClassVar = REDI
    name: Literal["redi"] = "redi"
    alpha: float = Field(0.8, ge=0)
    """Weight of the rejected side: 0 is fine-tuning on the chosen one; at 1 the likelihood of both is apt to fall."""
