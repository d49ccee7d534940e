"""SD-Zero's first phase: a model learns to revise its attempts."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import CrossEntropy, Loss, count_kept, kept_rows, measures_for, token_log_probs
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.sequences import over_sequences
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import IGNORE_INDEX, sequence_of, weights_of


class SDZeroRevision(TokenMethod):
    """SD-Zero's first phase (arXiv 2604.12002): cross-entropy on episodes whose last attempt is right.

    Of an episode of a prompt x, an attempt y, a control c that says whether it was right, and a revision z that is,

        L = -mean log q(z | x, y, c) - mean log q(y, c, z | x),

    each a mean over all tokens of its kind in the optimiser step (the paper's normaliser is not known here). Episodes
    without a right revision count for nothing. They come from rollouts with an environment such as `retry`, or, on
    steps that take the data's text, are conversations of two answers, held to be right.

    Args:
        student_share: share of optimiser steps on the student's own episodes.
        success: reward from which on a revision is right.
    """

    paper = "arXiv 2604.12002"
    weighs = True

    def __init__(
        self, losses: Sequence[Loss] = (), *, student_share: float = 1.0, success: float = 1.0, **options: Any
    ):
        if losses:
            raise ValueError("losses: sd_zero_revision is cross-entropy on both parts of an episode, and takes none")
        super().__init__(losses, **options)
        self.student_share, self.success = student_share, success

    @property
    def needs(self) -> frozenset[str]:
        own = {"rollouts", "reward", "turns"} if self.student_share > 0 else set()
        return frozenset(own | ({"labels"} if self.student_share < 1 else set()))

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        return "student" if draw < self.student_share else "data"

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        whole, revision = self.parts(batch)
        weights = weights_of(batch)
        counts = {"generation": count_kept(whole, weights), "revision": count_kept(revision, weights)}
        sequences = over_sequences(torch.ones(int(sequence_of(batch).max()) + 1, dtype=torch.long), batch)
        return super().counts(batch) | counts | {"sequences": sequences}

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the labels of attempt, control and revision together, and of the revision alone."""
        labels, ids, sequence = batch["labels"], batch["input_ids"], sequence_of(batch)
        drawn = (labels != IGNORE_INDEX).flatten()
        place, flat = torch.arange(len(drawn), device=drawn.device), sequence.flatten()
        count = int(flat.max()) + 1

        def of_drawn(values: Tensor, begin: int, way: str) -> Tensor:
            start = values.new_full((count,), begin)
            return start.scatter_reduce(0, flat[drawn], values[drawn], way)[flat]

        first, last = of_drawn(place, len(place), "amin"), of_drawn(place, -1, "amax")
        turn = batch["turn"].flatten() if "turn" in batch else _runs(drawn, flat)
        final = of_drawn(turn, -1, "amax")
        right = (final > 0) & self._right(batch, flat, final)
        inside = (place >= first) & (place <= last) & right
        told = ids.flatten().masked_fill(~inside, IGNORE_INDEX)
        revision = ids.flatten().masked_fill(~(inside & drawn & (turn == final)), IGNORE_INDEX)
        return told.view_as(labels), revision.view_as(labels)

    def _right(self, batch: Batch, sequence: Tensor, final: Tensor) -> Tensor:
        if "turn_rewards" not in batch:
            return torch.ones_like(sequence, dtype=torch.bool)
        return batch["turn_rewards"][sequence, final.clamp(min=0)] >= self.success

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        whole, revision = self.parts(batch)
        rows = kept_rows(whole, weights_of(batch))
        log_q, _ = token_log_probs(
            nets["student"](batch, rows), rows.labels, chunk_rows=self.chunk_rows, impl=self.impl
        )
        last = (rows.of_labels(revision) != IGNORE_INDEX).to(log_q)
        numbers = sequence_of(batch)
        there = numbers[revision != IGNORE_INDEX]
        revised = torch.zeros(int(numbers.max()) + 1, dtype=log_q.dtype, device=there.device).index_fill(0, there, 1)
        terms = {
            "revision": Term(-rows.sum(last * log_q), "revision"),
            "generation": Term(-rows.sum(log_q), "generation"),
        }
        return Terms(terms, {"revised": (over_sequences(revised, batch), "sequences")})

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give cross-entropy on given text, and every measure."""
        rows = kept_rows(batch["labels"], weights_of(batch))
        judge: Any = ("cross_entropy", CrossEntropy(), 1.0)
        return self.compare(nets["student"](batch, rows), None, rows, step, measures_for(None), [judge])


def _runs(trained: Tensor, sequence: Tensor) -> Tensor:
    """Return for each trained token the number of its run in its sequence; -1 for all others."""
    before = torch.nn.functional.pad(trained[:-1] & (sequence[:-1] == sequence[1:]), (1, 0))
    begins = (trained & ~before).long().cumsum(0)
    first = begins.new_full((int(sequence.max()) + 1,), len(begins))
    first = first.scatter_reduce(0, sequence[trained], begins[trained], "amin")
    return (begins - first[sequence]).masked_fill(~trained, -1)


class SDZeroRevisionSection(TokenOptions):
    """Learn to revise: cross-entropy on attempts, the control after them, and revisions that are right."""

    method: ClassVar = SDZeroRevision
    name: Literal["sd_zero_revision"] = "sd_zero_revision"
    student_share: float = Field(1.0, ge=0, le=1)
    """Share of optimiser steps on the student's own episodes; the others take the data's conversations."""
    success: float = 1.0
    """Reward from which on a revision is right."""
