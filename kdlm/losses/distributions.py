"""What the divergences share: two log-softmaxes, a KL between them, a mixture of them.

Everything works on logarithms in at least fp32, so nothing overflows and a probability that underflows costs nothing.
Logits may be -inf: tokens that a model rules out. Their probability is 0, and `0 log(0/x)` is 0 for any x, also for 0
(`times`). What that makes of each divergence is in this room's README.
"""

import math

import torch
from jaxtyping import Float
from kdlm_kernels.distribution import zeros
from torch import Tensor

LARGE = 1e30
"""In place of infinity, where one would be taken from another: its negative has an exponential of 0."""


def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x` in fp32 when it is narrower; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def log_probs(logits: Float[Tensor, "*rows vocab"], temperature: float) -> Float[Tensor, "*rows vocab"]:
    """Return `log softmax(logits / temperature)`. Raises ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = widen(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def log_prob_pair(
    student: Float[Tensor, "*rows vocab"], teacher: Float[Tensor, "*rows vocab"], temperature: float
) -> tuple[Float[Tensor, "*rows vocab"], Float[Tensor, "*rows vocab"]]:
    """Return `(log q, log p)` of the student and of the teacher, in one dtype; the teacher carries no gradient."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} must have one shape: "
            "cut both to the token ids that the two tokenizers share before the softmax"
        )
    log_q = log_probs(student, temperature)
    return log_q, log_probs(teacher.detach().to(log_q.dtype), temperature)


def kl(log_a: Float[Tensor, "*rows vocab"], log_b: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """Return `KL(a || b)` of two normalised log-probability vectors: inf where b is 0 and a is not."""
    return times(log_a.exp(), log_a - log_b).sum(-1)


def times(p: Float[Tensor, "*#shape"], x: Float[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Return `p x`, and 0 without gradient where p is 0, whatever x is: `0 log 0 = 0`."""
    nothing = zeros(p.detach())
    return p * (x if nothing is None else x.masked_fill(nothing, 0.0))


def entropy_of(log_p: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """Return the entropy in nats of a normalised log-probability vector."""
    return -times(log_p.exp(), log_p).sum(-1)


def log_mixture(
    log_p: Float[Tensor, "*rows vocab"], log_q: Float[Tensor, "*rows vocab"], share: float | Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows vocab"]:
    """Return `log(share * p + (1 - share) * q)` for `0 < share < 1`, one number or one for each row."""
    if isinstance(share, Tensor):
        share = share.to(log_p).unsqueeze(-1)
        return log_add(log_p + share.log(), log_q + torch.log1p(-share))
    return log_add(log_p + math.log(share), log_q + math.log1p(-share))


def log_add(theirs: Float[Tensor, "*shape"], ours: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `log(exp(theirs) + exp(ours))`; `theirs`, which has no gradient, is overwritten.

    Where both are infinite and equal, torch has no gradient for `ours`, not even one that is 0.
    """
    return torch.logaddexp(theirs.clamp_(-LARGE, LARGE), ours)


def rescale(value: Float[Tensor, "*rows"], temperature: float, t_squared: bool) -> Float[Tensor, "*rows"]:
    """Multiply by T^2, which keeps gradients of one order over temperatures (arXiv 1503.02531, section 2)."""
    return value * temperature**2 if t_squared and temperature != 1.0 else value
