"""Gradients of rows, small enough to keep, and what they say of a row: its influence on the loss of other rows."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.signal import Hidden

CHUNK = 256
"""Rows projected to the vocabulary at once."""


class Sketch:
    """Keeps the gradient of a head from being too large: `sum_t (A e_t) (B h_t)^T` for `sum_t e_t h_t^T`.

    e is the gradient at the logits, h the hidden state; A and B are drawn once, with `E[A^T A] = 1`, so that inner
    products of gradients are kept in the mean (as LoGra does, arXiv 2405.13954). A side that is no larger than `size`
    is kept whole, and both whole is the exact gradient.

    Args:
        vocab, width: of the head.
        size: of each side afterwards; the gradient of a row has at most size^2 numbers.
        seed: of A and B.
    """

    def __init__(self, vocab: int, width: int, size: int, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.left, self.right = (_projection(side, size, draw) for side in (vocab, width))

    def gradients(
        self, signal: Hidden, labels: Int[Tensor, "rows"], lengths: list[int]
    ) -> Float[Tensor, "sequences numbers"]:
        """Return, of each sequence, the mean over its rows of the gradient of `-log q(label)` in the head's weights.

        Args:
            signal: at the rows, sequence by sequence.
            lengths: how many rows each sequence has.
        """
        left, right = self.left.to(signal.hidden.device), self.right.to(signal.hidden.device)
        found = []
        for start in range(0, len(labels), CHUNK):
            at = slice(start, start + CHUNK)
            error = signal.head.logits(signal.hidden[at].float()).softmax(-1)
            error[torch.arange(len(error), device=error.device), labels[at]] -= 1
            found.append(error @ left.T)
        pull, states = torch.cat(found), signal.hidden.float() @ right.T
        parts = zip(pull.split(lengths), states.split(lengths), strict=True)
        return torch.stack([(e.T @ h).flatten() / max(1, len(e)) for e, h in parts])


def _projection(side: int, size: int, draw: torch.Generator) -> Tensor:
    return torch.eye(side) if side <= size else torch.randn(size, side, generator=draw) / size**0.5


def curvature(gradients: Float[Tensor, "rows numbers"], damping: float) -> Float[Tensor, "numbers numbers"]:
    """Return the mean outer product of gradients, and `damping` times its mean diagonal on the diagonal.

    For a log-likelihood that is the empirical Fisher matrix, which stands for the Hessian.
    """
    fisher = gradients.T @ gradients / max(1, len(gradients))
    return fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)


def influences(
    gradients: Float[Tensor, "rows numbers"],
    target: Float[Tensor, "numbers"],
    hessian: Float[Tensor, "numbers numbers"],
) -> Float[Tensor, "rows"]:
    """Return `-target^T H^-1 g_n`: how fast the loss with the gradient `target` rises as row n counts for more.

    Below 0 a row helps. (Koh and Liang 2017, arXiv 1703.04730, equation 2.)
    """
    return -(gradients @ torch.linalg.solve(hessian, target))


def weights_of_influence(
    influence: Float[Tensor, "rows"], shape: Literal["softplus", "linear"] = "softplus", strength: float = 1.0
) -> Float[Tensor, "rows"]:
    """Return weights of mean 1 that fall with the influence, standardised: `s = -(I - mean) / standard deviation`.

    `softplus` is `log(1 + exp(strength s))`, positive; `linear` is `1 + strength s`, cut to [0, 2]. Equal influences
    give equal weights.
    """
    spread = influence.std(correction=0)
    size = influence.abs().max() if len(influence) else spread
    standard = torch.where(spread > 1e-6 * size, -(influence - influence.mean()) / spread, 0.0)
    raw = torch.nn.functional.softplus(strength * standard)
    if shape == "linear":
        raw = (1 + strength * standard).clamp(0, 2)
    return raw / raw.mean()
