"""The probability of a chunk of text, matched as one yes or no: approximate likelihood matching (arXiv 2503.20083).

Two models need share no token to be compared: both give every chunk of the text a probability, the product of those of
its tokens. Formulas, offset and temperature are those of the paper's code (tokenkit, `compute_alm_loss`), with two
differences: values are multiplied by the temperature, and rounding above probability 1 is cut off.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ChunkDivergence = Literal["binary_ce", "reverse_kl", "absolute", "k2"]

OFFSET = 1e-6
"""What keeps a chunk's probability below 1, in nats: its complement has a logarithm then."""


def chunk_likelihood(
    student: Float[Tensor, "chunks"],
    teacher: Float[Tensor, "chunks"],
    temperature: float = 100.0,
    divergence: ChunkDivergence = "binary_ce",
) -> Float[Tensor, "chunks"]:
    """Return `tau f(s, t)` of each chunk, in nats; s and t are its log-probabilities over `temperature`, tau.

    With p = e^t and q = e^s, f is

    - `binary_ce`: -(p log q + (1 - p) log(1 - q)), the paper's. The least it can be is the teacher's own entropy.
    - `reverse_kl`: q log(q / p) + (1 - q) log((1 - q) / (1 - p)).
    - `absolute`: |s - t|, which tau does not change.
    - `k2`: (s - t)^2 / 2.

    The gradient is 0 where student and teacher agree, and none reaches the teacher. Its size hardly depends on tau: for
    large tau, `binary_ce` is a - b log a and what the student does not change, a and b being the surprisals of student
    and teacher, and its slope 1 - b / a, beside the 1 of cross-entropy. The paper's code leaves the factor out (and
    balances the gradients of its losses instead): its weight of 1 is 1 / tau here.
    """
    s, t = (_log_probability(value, temperature) for value in (student, teacher.detach()))
    return temperature * _FORMULAS[divergence](s, t)


def chunk_kl(
    student: Float[Tensor, "chunks"], teacher: Float[Tensor, "chunks"], temperature: float = 100.0
) -> Float[Tensor, "chunks"]:
    """Return `binary_ce` less the teacher's entropy: tau KL(p‖q) of the yes or no, 0 where the two agree. To read."""
    s, t = (_log_probability(value.detach(), temperature) for value in (student, teacher))
    return temperature * (_binary_ce(s, t) - _binary_ce(t, t))


def _log_probability(value: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities over the temperature, a little below 0 at most.

    The sum of a sure chunk may round to more than 0. It is moved down without a change to its gradient.
    """
    value = value if value.dtype == torch.float64 else value.float()
    return (value - value.detach().clamp(min=0)) / temperature - OFFSET


def _binary_ce(s: Tensor, t: Tensor) -> Tensor:
    # `expm1` alone: 1 - e^t would lose what a sure teacher leaves, and the two parts of the gradient would not cancel.
    rest = -torch.expm1(t)
    return -((1 - rest) * s + rest * _log_rest(s))


def _reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    rest = -torch.expm1(s)
    return (1 - rest) * (s - t) + rest * (_log_rest(s) - _log_rest(t))


def _log_rest(s: Tensor) -> Tensor:
    """Return log(1 - e^s)."""
    return torch.log(-torch.expm1(s))


_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "binary_ce": _binary_ce,
    "reverse_kl": _reverse_kl,
    "absolute": lambda s, t: (s - t).abs(),
    "k2": lambda s, t: (s - t).square() / 2,
}
