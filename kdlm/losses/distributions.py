"""What the divergences share: two log-softmaxes, a KL between them, a mixture of them.

Everything works on logarithms in at least fp32, so nothing overflows and a probability that underflows costs nothing:
`0 * log(p/q)` is 0 because the logarithms stay finite. Logits must be finite.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


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
    """Return `KL(a || b)` of two normalised log-probability vectors."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def log_mixture(
    log_a: Float[Tensor, "*rows vocab"], log_b: Float[Tensor, "*rows vocab"], share: float | Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows vocab"]:
    """Return `log(share * a + (1 - share) * b)` for `0 < share < 1`, one number or one for each row."""
    if isinstance(share, Tensor):
        share = share.to(log_a).unsqueeze(-1)
        return torch.logaddexp(log_a + share.log(), log_b + torch.log1p(-share))
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def rescale(value: Float[Tensor, "*rows"], temperature: float, t_squared: bool) -> Float[Tensor, "*rows"]:
    """Multiply by T^2, which keeps gradients of one order over temperatures (arXiv 1503.02531, section 2)."""
    return value * temperature**2 if t_squared and temperature != 1.0 else value
