"""Contrastive representation distillation: an image's two embeddings, told from those of others (arXiv 1910.10699)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from kdlm.losses.distributions import widen


def contrast_in_batch(
    student: Float[Tensor, "rows width"], teacher: Float[Tensor, "rows width"], *, temperature: float = 0.07
) -> Float[Tensor, "rows"]:
    """Return the cross-entropy of finding each row's partner among all rows of the other side, summed over both sides.

    The embeddings have length 1; scores are their products over the temperature (InfoNCE, arXiv 1807.03748). The
    negatives are the other rows, so the batch must not be cut. Both sides carry gradient: the teacher's is that of its
    projection. The order of the rows is inert.
    """
    scores = widen(student) @ widen(teacher).T / temperature
    own = torch.arange(len(scores), device=scores.device)
    return cross_entropy(scores, own, reduction="none") + cross_entropy(scores.T, own, reduction="none")


def contrast_with_bank(
    embedding: Float[Tensor, "rows width"],
    positive: Float[Tensor, "rows width"],
    negatives: Float[Tensor, "rows negatives width"],
    *,
    log_partition: float,
    bank: int,
    temperature: float = 0.07,
) -> Float[Tensor, "rows"]:
    """Return `-log h(positive) - sum_j log(1 - h(negative_j))` of each row, CRD's noise-contrastive estimate.

    `h = P / (P + K / N)` with `P = exp(<embedding, other> / temperature) / Z`, K the number of negatives, N that of the
    rows of the bank: whether `other` was drawn as the row's partner or as one of K from the bank (equations 10 to 17
    there; the released code adds 1e-7 to each denominator, this one works in logarithms). All vectors have length 1;
    positive and negatives come from the memory bank of the other network and carry no gradient.

    Args:
        log_partition: log Z.
        bank: N.
    """
    embedding, noise = widen(embedding), math.log(negatives.shape[1] / bank)
    positive, negatives = positive.detach().to(embedding), negatives.detach().to(embedding)

    def surplus(products: Tensor) -> Tensor:
        return products / temperature - log_partition - noise

    found = logsigmoid(surplus((embedding * positive).sum(-1)))
    refused = logsigmoid(-surplus(torch.einsum("rw,rnw->rn", embedding, negatives)))
    return -found - refused.sum(-1)
