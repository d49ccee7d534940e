"""DSKD: teacher and student are compared in the space of either, through the head of either."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

from kdlm.losses import AnyLoss, CrossEntropy, ForwardKL, Loss, weighted_sum
from kdlm.methods.cross_tokenizer.aligned import AlignedMethod, AlignedOptions, Readings
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.roles import Role, Trainable
from kdlm.signal import Hidden, Rows, Signal, sequence_of

PUBLISHED = ForwardKL(temperature=2.0, t_squared=False)
"""The divergence of the released runs, which leave T^2 out."""


class DSKD(AlignedMethod):
    """Match distributions in the student's and in the teacher's space (EMNLP 2024, arXiv 2406.17328).

    Where `t2s` takes the teacher's last hidden states to the student's width and `s2t` the student's to the teacher's:

        z_t2s = t2s(teacher's hidden) through the student's head, detached
        z_s2t = s2t(student's hidden) through the teacher's head
        loss  = cross-entropy of z_t2s                   trains the projectors
              + D(student, sg[z_t2s])                    trains the student
              + D(z_s2t, teacher)                        trains both

    With `attention` (DSKD-CMA) the tokenizers may differ: before the projected states meet a head they are mixed over
    the trained positions of the other's reading of the same sequence. At each position x is the embedding of the token
    that is read and y that of the token that follows, in the model's own input embeddings:

        query = query([x; y] of the student)    key = [x; y] / std of the teacher    scores = query key^T / sqrt(width)
        t2s   = softmax(scores) t2s(hidden / std + y / std)    s2t = softmax(scores^T) s2t(student's hidden)

    and D in the student's space counts only where z_t2s has the right token on top. As y is part of the value, it can
    be right without the teacher's hidden states. Without `attention` both readings must have the same trained tokens.

    The projectors are a role of their own: trained and checkpointed beside the student, never exported with it.

    Differences from the released code, on purpose: a vector is divided by its own standard deviation, not by that of
    the whole micro-batch with its padding, on which the gradient would then depend; the term of the teacher's space is
    a mean over the teacher's tokens, not their sum over the student's number; and D is the same in both spaces, where
    the code has forward KL in the teacher's.

    DSKDv2 (arXiv 2504.11426) is not in it: exact token alignment in place of attention, the teacher's most probable
    tokens as labels of z_t2s, and an s2t that is solved from the two heads at each step.

    Args:
        losses: of the student alone, such as cross-entropy; the paper weighs it by 1 - `weight`.
        divergence: D, a loss that looks at a teacher; its weight is a factor on D in both spaces.
        weight: factor on the three terms.
        attention: cross-model attention.
        projector_learning_rate: the projectors' own rate.
    """

    paper = "arXiv 2406.17328"
    signals = frozenset({Hidden})

    def __init__(
        self, losses=(), *, divergence: Loss = PUBLISHED, weight=0.5, attention=True, projector_learning_rate=1e-3,
        **options,
    ):  # fmt: skip
        super().__init__(losses, **options)
        self.divergence, self.weight, self.attention = divergence, weight, attention
        self.projector_learning_rate = projector_learning_rate

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"teacher.layers"}

    @property
    def roles(self) -> dict[str, Role]:
        return {"student": Trainable(), "projectors": Trainable(self._projectors, self.projector_learning_rate)}

    def match(self, readings: Readings, nets: Nets, batch: Batch, step: Step) -> Terms:
        ours, theirs = _hidden("student", readings.student), _hidden("teacher", readings.teacher)
        labels, their_labels = readings.rows.labels, readings.their_rows.labels
        t2s, s2t, met, their_met = self._projected(readings, ours, theirs, nets, batch)
        seen = Hidden(t2s.to(ours.hidden.dtype), ours.head.detach())
        back = Hidden(s2t.to(theirs.hidden.dtype), theirs.head)

        call: dict[str, Any] = {"chunk_rows": self.chunk_rows, "impl": self.impl}
        own = [("cross_entropy", CrossEntropy(), 1.0)]
        apart = [("divergence", self.divergence, self.divergence.weight_at(step.progress, step.index))]
        surprise, found = weighted_sum(own, seen, None, labels, measures=("accuracy",), **call)
        there, _ = weighted_sum(apart, ours, Hidden(seen.hidden.detach(), seen.head), labels, **call)
        here, _ = weighted_sum(apart, back, theirs, their_labels, **call)

        rows, their_rows = readings.rows, readings.their_rows
        right = met * found["accuracy"]
        kept = right if self.attention else met
        terms = {
            "t2s_cross_entropy": Term(rows.sum(met * surprise), "tokens", self.weight),
            "student_space": Term(rows.sum(kept * there), "tokens", self.weight),
            "teacher_space": Term(their_rows.sum(their_met * here), "their_tokens", self.weight),
        }
        return Terms(terms, {"t2s_accuracy": (rows.sum(right), "tokens")})

    def _projected(
        self, readings: Readings, ours: Hidden, theirs: Hidden, nets: Nets, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what either says in the other's space, and which rows of either have rows of the other to look at."""
        projectors, rows, their_rows = nets["projectors"], readings.rows, readings.their_rows
        dtype = projectors["t2s"].weight.dtype  # of a bf16 student the projectors are fp32
        student, teacher = ours.hidden.to(dtype), theirs.hidden.detach().to(dtype)
        if not self.attention:
            if not torch.equal(rows.labels, their_rows.labels):
                raise ValueError(
                    "method.attention: false compares position by position, but student and teacher read the text as "
                    "different tokens: set attention: true"
                )
            every = torch.ones_like(rows.labels)
            return projectors["t2s"](teacher), projectors["s2t"](student), every, every
        read: Any = batch["theirs"]
        with torch.no_grad():
            embedded = _pairs(nets["student"], batch, rows).to(dtype)
            pairs = _pairs(nets["teacher"], read, their_rows).to(dtype)
            follows = pairs.chunk(2, dim=-1)[1]
        values = projectors["t2s"](_scaled(teacher) + _scaled(follows))
        lengths, their_lengths = _lengths(batch, rows), _lengths(read, their_rows)
        t2s, s2t = cross_attention(
            projectors["query"](embedded),
            _scaled(pairs),
            projectors["s2t"](student),
            values,
            lengths.tolist(),
            their_lengths.tolist(),
        )
        met, their_met = (their_lengths > 0).repeat_interleave(lengths), (lengths > 0).repeat_interleave(their_lengths)
        return t2s, s2t, met, their_met

    def _projectors(self, student: Any, teacher: Any) -> nn.ModuleDict:
        ours, theirs = student.hidden_size, teacher.hidden_size
        made = {"t2s": nn.Linear(theirs, ours), "s2t": nn.Linear(ours, theirs)}
        return nn.ModuleDict(made | ({"query": nn.Linear(2 * ours, 2 * theirs)} if self.attention else {}))


def cross_attention(
    query: Float[Tensor, "rows width"],
    key: Float[Tensor, "their_rows width"],
    ours: Float[Tensor, "rows their_size"],
    theirs: Float[Tensor, "their_rows size"],
    lengths: Sequence[int],
    their_lengths: Sequence[int],
) -> tuple[Float[Tensor, "rows size"], Float[Tensor, "their_rows their_size"]]:
    """Mix the values `theirs` for each row by its attention to their rows, and `ours` for each of theirs, backwards.

    Attention stays within a sequence: the first `lengths[0]` rows and the first `their_lengths[0]` of theirs are one,
    and so on. It is computed one sequence after the other, so that no sum has padding in it. A row without any to look
    at gets 0.
    """
    found, back = [], []
    split = zip(
        query.split(lengths), key.split(their_lengths), ours.split(lengths), theirs.split(their_lengths), strict=True
    )
    for q, k, own, other in split:
        scores = q @ k.T / math.sqrt(k.shape[-1])
        found.append(scores.softmax(-1) @ other)
        back.append(scores.T.softmax(-1) @ own)
    return torch.cat(found), torch.cat(back)


def _scaled(vectors: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Divide each vector by its own standard deviation."""
    centred = vectors - vectors.mean(-1, keepdim=True)  # `std` itself warns where there are no rows
    return vectors / centred.square().sum(-1, keepdim=True).div(vectors.shape[-1] - 1).sqrt().clamp(min=1e-6)


def _pairs(model: Any, batch: Batch, rows: Rows) -> Float[Tensor, "rows width"]:
    """Return the input embeddings of the token that each row reads and of the one that follows, side by side."""
    return torch.cat([model.embed(rows.select(batch["input_ids"])), model.embed(rows.labels)], dim=-1)


def _lengths(batch: Batch, rows: Rows) -> Int[Tensor, "sequences"]:
    """Return how many of the rows each sequence of the batch has."""
    sequence = sequence_of(batch)
    return rows.select(sequence).bincount(minlength=int(sequence.max()) + 1)


def _hidden(role: str, signal: Signal) -> Hidden:
    if not isinstance(signal, Hidden):
        raise ValueError(
            f"method: dskd reads hidden states, and the {role} gives none (its logits are not head(hidden), or "
            "teacher.signal is dense)"
        )
    return signal


class DSKDSection(AlignedOptions):
    """Compare teacher and student in the space of either, through learned projectors, beside the recipe's `losses`."""

    method: ClassVar = DSKD
    name: Literal["dskd"] = "dskd"
    divergence: AnyLoss = PUBLISHED
    """What compares two distributions, in both spaces; its weight is a factor on it in both."""
    weight: float = Field(0.5, ge=0)
    """Weight of the three terms; the paper gives cross-entropy the rest of 1."""
    attention: bool = True
    """Let each position of one reading attend to those of the other. Not needed where both have one tokenizer."""
    projector_learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of the projectors."""

    @field_validator("divergence")
    @classmethod
    def _compares(cls, divergence: Loss) -> Loss:
        if not divergence.needs_teacher:
            raise ValueError("looks at no teacher: take a divergence, such as forward_kl")
        return divergence
