"""SquareHead: every layer of a student follows the same layer of its teacher, each error against the teacher's size."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses import count_kept, count_real, kept_rows, measures_for, real_rows
from kdlm.methods.method import Batch, Nets, Step, Term, Terms
from kdlm.methods.tokens import TokenMethod, TokenOptions
from kdlm.signal import take, weights_of

EPSILON = 1e-6
"""Added to a teacher state's mean square, in float32; the released code has bfloat16's machine epsilon, 0.0078."""


def relative_error(
    student: Float[Tensor, "*rows hidden"], teacher: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows"]:
    """Return `mean (h_s - h_t)^2 / (mean h_t^2 + eps)` of each row, means over the width, in at least float32.

    0 at equality, 1 for a student of zeros; scaling both sides changes nothing. Teachers have no gradient here.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.detach().to(wide)
    return (student - teacher).square().mean(-1) / (teacher.square().mean(-1) + EPSILON)


class SquareHead(TokenMethod):
    """Match the output of every decoder layer at every token of the text, beside token losses (arXiv 2310.06927).

    The paper's term of a layer is `mean (H_s - H_t)^2 / mean H_t^2`, both means over all tokens of a batch. A quotient
    of two sums over the batch changes with the way in which a step is cut into micro-batches and ranks, so here each
    token has its own denominator, and their mean over all tokens of the step is the term. Both are the same where all
    of a layer's states are of one size. Where they are not, the paper's term is nearly that of the largest alone (a
    first token that all others attend to is often a hundred times as large), and here all tokens count alike.

    The student is meant to be the teacher's own architecture with fewer weights (`sparsity` of a recipe), so layers are
    compared one by one, without projectors. The last layer's output is compared before the final norm; the released
    code takes it after.

    Args:
        losses: token losses at the kept positions; the paper has cross-entropy and forward KL.
        weight: factor on the sum over layers.
    """

    paper = "arXiv 2310.06927"
    needs = frozenset({"labels", "teacher", "teacher.layers"})
    weighs = True

    def __init__(self, losses=(), *, weight=1.0, **options):
        super().__init__(losses, **options)
        self.weight = weight

    @property
    def leaves_unused(self) -> bool:
        return not self.token_losses  # the final norm and the head

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": count_kept(batch["labels"], weights_of(batch)), "positions": count_real(batch)}

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        return self._match(nets, batch, step)

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Give the step's own terms, and every measure that can be taken with this teacher."""
        return self._match(nets, batch, step, measured=True)

    def _match(self, nets: Nets, batch: Batch, step: Step, *, measured: bool = False) -> Terms:
        real, kept = real_rows(batch), kept_rows(batch["labels"], weights_of(batch))
        layers = range(_common_depth(nets["student"], nets["teacher"]))
        theirs, targets = nets["teacher"].with_layers(batch, real, layers)
        ours, hidden = nets["student"].with_layers(batch, real, layers)
        errors = torch.stack([relative_error(*pair) for pair in zip(hidden, targets, strict=True)]).sum(0)
        matched = real.sum(errors)
        terms = {"squarehead": Term(matched, "positions", self.weight)}
        metrics = {"squarehead": (matched.detach(), "positions")}
        if self.token_losses or measured:
            where = torch.searchsorted(real.index, kept.index)  # what is trained on is among the real tokens
            student: Any = take(ours, where)
            measures = measures_for(type(theirs)) if measured else ()
            logits = self.compare(student, take(theirs, where), kept, step, measures)
            terms |= logits.terms if self.token_losses else {}
            metrics |= logits.metrics
        return Terms(terms, metrics)


def _common_depth(student: Any, teacher: Any) -> int:
    """Return the number of layers of both. Raises ValueError where the two are not of one shape."""
    ours, theirs = ((net.num_layers, net.hidden_size) for net in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"method: squarehead compares layer by layer, and the student has {ours[0]} layers of width {ours[1]}, the "
            f"teacher {theirs[0]} of width {theirs[1]}: use hidden_kd, which has a map of layers and projectors"
        )
    return ours[0]


class SquareHeadSection(TokenOptions):
    """Every layer follows the same layer of a teacher of the same shape; the recipe's token losses beside it."""

    method: ClassVar = SquareHead
    name: Literal["squarehead"] = "squarehead"
    weight: float = Field(1.0, ge=0)
    """Weight of the sum over layers of the relative squared error."""
