"""The probability of a chunk of text, matched as one yes or no: approximate likelihood matching (arXiv 2503.20083)."""

import torch
from jaxtyping import Float
from torch import Tensor


def chunk_likelihood(
    student: Float[Tensor, "chunks"], teacher: Float[Tensor, "chunks"], temperature: float = 100.0
) -> Float[Tensor, "chunks"]:
    """Return `-(e^t s + (1 - e^t) log(1 - e^s))` of each chunk, s and t being its log-probability over `temperature`.

    The gradient is 0 where student and teacher agree, and none reaches the teacher. A little below 0 instead of 0
    itself keeps the logarithm finite.
    """
    s, t = (value / temperature - 1e-6 for value in (student.float(), teacher.detach().float()))
    p = t.exp()
    return -(p * s + (1 - p) * torch.log(-torch.expm1(s)))
