"""Random-sampling KD: a teacher known by tokens drawn from it."""

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.losses.distributions import times, widen
from kdlm.signal import Sampled


def sampled_cross_entropy(
    student: Float[Tensor, "*rows vocab"], teacher: Sampled, *, temperature: float = 1.0
) -> Float[Tensor, "*rows"]:
    """Return `-sum_v t(v) log q(v)`, where t is the share of draws of each token (arXiv 2503.16870).

    For tokens drawn from p the expected gradient is that of forward KL, which top-k with renormalisation misses. The
    value is a cross-entropy: the teacher's entropy is not known from the draws, so it is **not** 0 at equality and only
    its differences mean something. Counts are divided by their sum, which is exact for draws from p and slightly biased
    for importance-weighted ones. Rows without a draw give 0. Raises ValueError at a temperature other than 1.
    """
    if temperature != 1.0:
        raise ValueError(
            f"temperature {temperature} on a sampled signal: its tokens were drawn at temperature 1, and what would "
            "have been drawn at another is not known; use temperature 1 or a teacher that gives full logits"
        )
    student, counts = widen(student), widen(teacher.counts)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    log_q = student.gather(-1, teacher.ids) - student.logsumexp(-1, keepdim=True)
    return -times(share, log_q).sum(-1)
