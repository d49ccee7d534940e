"""Fitting the weights of an ensemble: those under which the mixture predicts held-out tokens best.

Both problems are convex in the weights, and both give the same answer every time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.signal import Dense, Hidden

ITERATIONS = 500
TOLERANCE = 1e-9
"""Gain in nats a position below which fitting ends."""
LOGITS = 1 << 26
"""Logits of all members together that are in memory at once."""


class HeldOut(NamedTuple):
    """The members' signals at the same held-out rows, and the tokens that follow there."""

    signals: Sequence[Hidden | Dense]
    labels: Int[Tensor, "rows"]


def expectation_maximisation(log_p: Float[Tensor, "rows members"]) -> tuple[Float[Tensor, "members"], list[float]]:
    """Return the logarithms of the weights that maximise `mean log sum_i w_i p_i(label)`, and its value on the way.

    Args:
        log_p: what each member gives the token that follows.

    Each step is the mean of the members' responsibilities, which never lowers the likelihood (Dempster, Laird and
    Rubin 1977). In float64.
    """
    log_p = log_p.double()
    log_w = torch.full_like(log_p[0], 1 / log_p.shape[1]).log()
    values: list[float] = []
    for _ in range(ITERATIONS):
        joint = log_p + log_w
        total = joint.logsumexp(1, keepdim=True)
        values.append(total.mean().item())
        if len(values) > 1 and values[-1] - values[-2] < TOLERANCE:
            break
        log_w = (joint - total).exp().mean(0).log()
    return log_w, values


def geometric_weights(
    objective: Callable[[Float[Tensor, "members"]], tuple[float, Float[Tensor, "members"]]], members: int
) -> Float[Tensor, "members"]:
    """Return the logarithms of the weights that minimise a convex function of them, from equal weights on.

    Args:
        objective: weights -> value and gradient.

    The weights are a softmax of what L-BFGS moves, so they stay positive and add up to 1. In float64.
    """
    free = torch.zeros(members, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=ITERATIONS, tolerance_change=TOLERANCE, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        weights = free.detach().softmax(0)
        value, gradient = objective(weights)
        free.grad = weights * (gradient - (weights * gradient).sum())
        return value

    optimizer.step(closure)
    return free.detach().log_softmax(0)


def label_log_probs(held_out: HeldOut, vocab: int | Tensor | None) -> Float[Tensor, "rows members"]:
    """Return what each member gives the token that follows, over the shared ids; rows of other tokens are left out."""
    found = []
    for log_p, labels in _log_probs(held_out, vocab):
        found.append(torch.stack([one.gather(1, labels[:, None]).squeeze(1) for one in log_p], 1))
    return torch.cat(found)


def geometric_cross_entropy(
    pieces: Sequence[HeldOut], vocab: int | Tensor | None, weights: Float[Tensor, "members"]
) -> tuple[float, Float[Tensor, "members"]]:
    """Return the mean cross-entropy of `prod_i p_i^w_i`, normalised, and its gradient to the weights.

    The gradient is `E[log p_i] - log p_i(label)`, the mean taken under the mixture: convex, as log-sum-exp is.
    """
    value, gradient, rows = 0.0, torch.zeros_like(weights), 0
    for piece in pieces:
        for log_p, labels in _log_probs(piece, vocab):
            joint = sum(w * one for w, one in zip(weights.tolist(), log_p, strict=True))
            assert isinstance(joint, Tensor)
            log_q = joint.log_softmax(1)
            at = labels[:, None]
            value -= log_q.gather(1, at).double().sum().item()
            q = log_q.exp()
            slopes = [((q * one).sum(1) - one.gather(1, at).squeeze(1)).double().sum() for one in log_p]
            gradient += torch.stack(slopes).to(gradient)
            rows += len(labels)
    return value / max(1, rows), gradient / max(1, rows)


def _log_probs(held_out: HeldOut, vocab: int | Tensor | None):
    """Yield the members' log-probabilities over the shared ids, some rows at a time, and the labels' places there."""
    signals, labels = held_out
    shared = slice(vocab) if vocab is None or isinstance(vocab, int) else vocab
    step = max(1, LOGITS // sum(signal.vocab_size for signal in signals))
    for start in range(0, len(labels), step):
        at = slice(start, start + step)
        log_p = []
        for signal in signals:
            logits = signal.head.logits(signal.hidden[at]) if isinstance(signal, Hidden) else signal.logits[at]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            log_p.append(torch.log_softmax(wide[:, shared], 1))
        place, known = _places(labels[at], vocab, log_p[0].shape[1])
        yield [one[known] for one in log_p], place[known]


def _places(labels: Tensor, vocab: int | Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Return where the labels stand among the shared ids, and whether they are there at all."""
    if not isinstance(vocab, Tensor):
        return labels, labels < size
    ids = vocab.to(labels.device)
    place = torch.searchsorted(ids, labels).clamp(max=size - 1)
    return place, ids[place] == labels
