"""Policy gradients on sampled tokens: sums along a sequence, importance weights, an estimator of reverse KL.

With `d = log q(y) - log p(y)` and y drawn from q, three estimators of KL(q || p) are in use (Schulman 2020):

    k1 = d                 unbiased. As a loss it has no gradient in mean; `sg[d] log q(y)` has that of reverse KL.
    k2 = d^2 / 2           biased; its gradient is that of reverse KL in mean.
    k3 = exp(-d) - 1 + d   unbiased, never negative; its gradient is that of *forward* KL in mean.

So k1 is what to put in front of `log q`, and k3 what to look at.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def k3(log_ratio: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Return `exp(-d) - 1 + d` of `d = log q(y) - log p(y)`: reverse KL in mean, 0 or more on every row."""
    return torch.expm1(-log_ratio) + log_ratio


def importance_weights(log_ratio: Float[Tensor, "rows"], cap: float) -> Float[Tensor, "rows"]:
    """Return `min(q(y) / b(y), cap)` without gradient, from `log q(y) - log b(y)` of tokens drawn from b.

    Means weighted like this are those under q, as far as no weight is cut and the states before the tokens go.
    """
    return log_ratio.detach().clamp(max=math.log(cap)).exp()


def returns(
    rewards: Float[Tensor, "rows"], sequence: Int[Tensor, "rows"], discount: float = 1.0
) -> Float[Tensor, "rows"]:
    """Return `sum_{j >= i} discount^(j - i) reward_j` over the rows j of i's sequence, whose rows stand together.

    By doubling: after each turn a row holds the sum over twice as many rows, so no power of the discount is divided
    by, and nothing of one sequence ever enters the sum of another.
    """
    total, reach = rewards, 1
    while reach < len(rewards):
        same = sequence[reach:] == sequence[:-reach]
        later = (discount**reach * total[reach:]).masked_fill(~same, 0.0)
        total = total + torch.nn.functional.pad(later, (0, reach))
        reach *= 2
    return total
