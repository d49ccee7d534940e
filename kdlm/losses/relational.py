"""Relations between embeddings: of a batch (RKD, CVPR 2019, arXiv 1904.05068), or of the tokens of one image.

Student and teacher may have embeddings of different width. The losses of RKD compare rows with each other, so a row's
value depends on what it comes together with: the batch must not be cut, and on several ranks only what a rank holds is
compared unless the caller gathers. `correlation_distance` looks at one image at a time.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, smooth_l1_loss

from kdlm.losses.distributions import widen


def rkd_distance(student: Float[Tensor, "rows width"], teacher: Float[Tensor, "rows other"]) -> Float[Tensor, "rows"]:
    """Return the smooth L1 of each row's distances to the other rows, mean over those (RKD-D; its weight there: 25).

    Distances are divided by the mean of those above 0, in the student with gradient. Moving, turning or scaling either
    side is inert. The mean over the rows times `(rows - 1) / rows` is the released code's value, which counts the
    distance of each row from itself. A row without others gives 0; the teacher carries no gradient.
    """
    found, wanted = _distances(widen(student)), _distances(widen(teacher.detach()))
    errors = smooth_l1_loss(found, wanted.to(found), reduction="none")
    return errors.sum(-1) / max(len(student) - 1, 1)


def rkd_angle(student: Float[Tensor, "rows width"], teacher: Float[Tensor, "rows other"]) -> Float[Tensor, "rows"]:
    """Return the smooth L1 of the cosines of the angles at each row between two others (RKD-A; its weight there: 50).

    Mean over the ordered pairs of two different others; the mean over the rows times `(rows - 1)(rows - 2) / rows^2` is
    the released code's value. Moving, turning or scaling either side is inert. Makes `rows^3` and `rows^2 width`
    numbers: give it some hundred rows. A row without two others gives 0; the teacher carries no gradient.
    """
    found, wanted = _cosines(widen(student)), _cosines(widen(teacher.detach()))
    errors = smooth_l1_loss(found, wanted.to(found), reduction="none")
    # An angle between a row and itself is 0 on both sides, or, without a distance, undefined: it does not count.
    errors = errors.masked_fill(torch.eye(len(student), dtype=torch.bool, device=student.device), 0.0)
    return errors.sum((-2, -1)) / max((len(student) - 1) * (len(student) - 2), 1)


def correlation_distance(
    student: Float[Tensor, "images tokens width"],
    teacher: Float[Tensor, "images tokens other"],
    there: Bool[Tensor, "images tokens"],
    distance: Literal["cosine", "mse"] = "cosine",
) -> Float[Tensor, "images"]:
    """Return how far apart two images' self-correlations are (RDist of LLaVA-KD, ICCV 2025, arXiv 2410.16236).

    The self-correlation of an image of n tokens is the `[n, n]` matrix of cosines between its tokens' hidden states.
    `cosine` is 1 minus the cosine of the two matrices taken as vectors, `mse` the mean over their n^2 entries. `there`
    is False at padding, which is inert. Turning or scaling either side is inert; the teacher carries no gradient. The
    paper's training code was not released when this was written: whether it takes cosines here is unverified.
    """
    pairs = there[:, :, None] & there[:, None, :]
    ours, theirs = (
        (unit @ unit.transpose(-2, -1)).masked_fill(~pairs, 0.0).flatten(1)
        for unit in (normalize(widen(student), dim=-1), normalize(widen(teacher.detach()), dim=-1))
    )
    if distance == "cosine":
        return 1 - cosine_similarity(ours, theirs.to(ours), dim=-1)
    return (ours - theirs.to(ours)).square().sum(-1) / pairs.sum((1, 2)).clamp(min=1)


def _distances(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows rows"]:
    # Not by products: those lose the small distances, and have an infinite gradient at 0.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows rows rows"]:
    """Return at `[i, j, k]` the cosine at row i between rows j and k: 0, without gradient, where one of them is i."""
    arms = x[None] - x[:, None]
    square = arms.square().sum(-1, keepdim=True)
    apart = square > 0
    unit = torch.where(apart, arms / torch.where(apart, square, 1.0).sqrt(), 0.0)
    return unit @ unit.transpose(-2, -1)
