"""Soft labels without a teacher: from the student's own predictions, a weak head's, or those of an earlier epoch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.cross_entropy import cross_entropy
from kdlm.losses.distributions import log_prob_pair, log_probs, times
from kdlm.losses.targeted import against_others, at, without
from kdlm.signal import IGNORE_INDEX


def uskd_target(
    student: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"], mean_square: float | Float[Tensor, ""]
) -> Float[Tensor, "*rows"]:
    """Return USKD's soft label of the label's class, `1 + q_y^2 - mean_square` (arXiv 2303.13005), without gradient.

    `mean_square` is the mean of `q_y^2` over the batch, all ranks of it. Never negative.
    """
    with torch.no_grad():
        return 1 + at(log_probs(student, 1.0), labels.clamp(min=0)).mul(2).exp() - mean_square


def uskd_others(
    student: Float[Tensor, "*rows vocab"], weak: Float[Tensor, "*rows vocab"], labels: Int[Tensor, "*rows"]
) -> Float[Tensor, "*rows vocab"]:
    """Return USKD's soft labels of the other classes: 1 / rank, normalised, 0 at the label (arXiv 2303.13005).

    Classes are ranked by `w(v) / (1 - w_y) + q(v) / (1 - q_y)`, w the weak head's distribution. The label takes part in
    the ranking and is left out afterwards, as in the released code. Only the order matters; no gradient.
    """
    label = labels.clamp(min=0)
    with torch.no_grad():
        log_q, log_w = log_prob_pair(student, weak, 1.0)
        score = torch.logaddexp(against_others(log_w, label), against_others(log_q, label))
        best_first = score.argsort(dim=-1, descending=True, stable=True)
        shares = torch.arange(1, score.shape[-1] + 1, device=score.device, dtype=score.dtype).reciprocal()
        zipf = without(torch.empty_like(score).scatter_(-1, best_first, shares.expand_as(score)), label)
        return zipf / zipf.sum(-1, keepdim=True)


def uskd(
    student: Float[Tensor, "*rows vocab"],
    weak: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"],
    *,
    mean_square: float | Float[Tensor, ""],
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Float[Tensor, "*rows"]:
    """Return `-alpha P_y log q_y - beta sum_{v != y} Z(v) log q'(v)`: USKD (ICCV 2023, arXiv 2303.13005).

    `P_y` is `uskd_target`, Z `uskd_others`, and q' the student's distribution of the other classes among themselves.
    The weak head, on a feature in the middle of the student, gets no gradient here: it learns by cross-entropy with
    label smoothing 0.1, times 0.005 in the paper. Not 0 where the student is right. A row whose label is IGNORE_INDEX
    gives 0 and no gradient: there is no teacher to ask.

    Args:
        mean_square: mean of `q_y^2` over the labelled rows of the batch, all ranks of it, from the student's logits
            or, in chunks, from `token_log_probs`.
    """
    label = labels.clamp(min=0)
    log_q = log_probs(student, 1.0)
    target = uskd_target(student, labels, mean_square) * at(log_q, label)
    others = (uskd_others(student, weak, labels) * against_others(log_q, label)).sum(-1)
    return torch.where(labels == IGNORE_INDEX, 0.0, -alpha * target - beta * others)


def progressive_cross_entropy(
    student: Float[Tensor, "*rows vocab"],
    previous: Float[Tensor, "*rows vocab"],
    labels: Int[Tensor, "*rows"],
    *,
    share: float | Float[Tensor, "*rows"],
) -> Float[Tensor, "*rows"]:
    """Return the cross-entropy of q under `(1 - share) onehot(label) + share p` (PS-KD, ICCV 2021, arXiv 2006.12000).

    p is what the student predicted for the same rows an epoch ago (`previous`: logits or log-probabilities, no
    gradient); the paper's `share` in epoch e of E is `0.8 e / E`. The gradient is `q` minus that target. Share 0 is
    `cross_entropy`. Without a label (IGNORE_INDEX) the second part alone remains.
    """
    log_q, log_p = log_prob_pair(student, previous, 1.0)
    return (1 - share) * cross_entropy(student, labels) - share * times(log_p.exp(), log_q).sum(-1)


def label_share(
    targets: Float[Tensor, "*rows outputs"],
    unguided: Float[Tensor, "*rows outputs"],
    guided: Float[Tensor, "*rows outputs"],
) -> Float[Tensor, ""]:
    """Return the share of labels in a generation's target, between 0 and 1 (NeurIPS 2021, arXiv 2102.13088).

    Of rows that neither has seen, two students have said something: `guided` was trained on the labels, `unguided` on
    what the generation before says. Of all `(1 - a) unguided + a guided` the one nearest to the `targets` has
    `a = <targets - unguided, guided - unguided> / |guided - unguided|^2`, clipped. A student trained on both targets,
    mixed, is that point where it is linear in its target (kernel ridge); for a network, whose probabilities are held
    against one-hot labels, it is an estimate. nan where the two say the same.
    """
    line = guided - unguided
    return ((targets - unguided) * line).sum().div(line.square().sum()).clamp(0, 1)
