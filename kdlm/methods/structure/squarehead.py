"""SquareHead: every layer of a student follows the same layer of its teacher, each error against the teacher's size."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.losses.distributions import widen
from kdlm.methods.method import Batch, Nets
from kdlm.methods.structure.inside_method import InsideMethod
from kdlm.methods.tokens import TokenOptions
from kdlm.models import Ask, Inside
from kdlm.signal import Rows

EPSILON = 1e-6
"""Added to a teacher state's mean square, in float32; the released code has bfloat16's machine epsilon, 0.0078."""


def relative_error(
    student: Float[Tensor, "*rows hidden"], teacher: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows"]:
    """Return `mean (h_s - h_t)^2 / (mean h_t^2 + eps)` of each row, means over the width, in at least float32.

    0 at equality, 1 for a student of zeros; scaling both sides changes nothing. Teachers have no gradient here.
    """
    student, teacher = widen(student), widen(teacher.detach())
    return (student - teacher).square().mean(-1) / (teacher.square().mean(-1) + EPSILON)


class SquareHead(InsideMethod):
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

    def __init__(self, losses=(), *, weight=1.0, **options):
        super().__init__(losses, **options)
        self.weight = weight

    def asks(self, student: Any, teacher: Any) -> tuple[Ask, Ask]:
        ours, theirs = ((net.num_layers, net.hidden_size) for net in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"method: squarehead compares layer by layer, and the student has {ours[0]} layers of width {ours[1]}, "
                f"the teacher {theirs[0]} of width {theirs[1]}: use hidden_kd or tinybert, which have a map of layers"
            )
        every = Ask(range(ours[0]))
        return every, every

    def compared_inside(
        self, nets: Nets, batch: Batch, rows: Rows, ours: Inside, theirs: Inside
    ) -> dict[str, tuple[Tensor, float]]:
        errors = [relative_error(*pair) for pair in zip(ours.hidden, theirs.hidden, strict=True)]
        return {"squarehead": (torch.stack(errors).sum(0), self.weight)}


class SquareHeadSection(TokenOptions):
    """Every layer follows the same layer of a teacher of the same shape; the recipe's token losses beside it."""

    method: ClassVar = SquareHead
    name: Literal["squarehead"] = "squarehead"
    weight: float = Field(1.0, ge=0)
    """Weight of the sum over layers of the relative squared error."""
