"""Losses on the affinities of images and texts: CLIP's own, and mimicking a teacher's (TinyCLIP, ICCV 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdlm.losses.distributions import widen


def clip_loss(
    images: Float[Tensor, "rows width"], texts: Float[Tensor, "rows width"], scale: float | Tensor
) -> Float[Tensor, "rows"]:
    """Return the cross-entropy of finding each image's text among all texts, and its image among all images, halved.

    The embeddings have length 1; `scale` multiplies their products (CLIP, arXiv 2103.00020; there learned). Rows are
    compared with each other: the batch must not be cut.
    """
    scores = scale * (widen(images) @ widen(texts).T)
    own = torch.arange(len(scores), device=scores.device)
    return 0.5 * (cross_entropy(scores, own, reduction="none") + cross_entropy(scores.T, own, reduction="none"))


def affinity(
    images: Float[Tensor, "rows width"],
    texts: Float[Tensor, "rows width"],
    teacher_images: Float[Tensor, "rows other"],
    teacher_texts: Float[Tensor, "rows other"],
    *,
    scale: float = 50.0,
) -> Float[Tensor, "rows"]:
    """Return `1/2 [CE(A_t, A_s) + CE(A_t', A_s')]` of each row (TinyCLIP, arXiv 2309.12314, equation 4).

    `A = softmax(scale * <image, text>)` over the texts, `A'` over the images, of teacher and student, with one fixed
    scale for both: what a teacher learned for its own is not used. The gradient is that of the forward KL; the value
    holds the teacher's entropy and so is **not** 0 at equality. All embeddings have length 1; the widths of student and
    teacher may differ. The order of the rows is inert; the teacher carries no gradient.
    """
    ours = scale * (widen(images) @ widen(texts).T)
    theirs = scale * (widen(teacher_images.detach()) @ widen(teacher_texts.detach()).T).to(ours)
    of_images = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1)
    of_texts = -(theirs.T.softmax(-1) * ours.T.log_softmax(-1)).sum(-1)
    return 0.5 * (of_images + of_texts)
