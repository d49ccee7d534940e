"""The weight of adaptive KL: how much of the gap between p and q lies in the teacher's head (arXiv 2404.02657)."""

import torch
from torch import Tensor

from kdlm_kernels.distribution import Distribution
from kdlm_kernels.merging import Merge

_DEPTH, _BINS = 64.0, 512
"""The head of a distribution is looked for down to exp(-64), in steps of 512 bins each."""


def head_share(p: Distribution, q: Distribution, mass: float, merge: Merge) -> Tensor:
    """Return the share `[n, 1]` of `sum |p - q|` that lies in the teacher's head; 1/2 where the two are equal."""
    gap = (p.probs - q.probs).abs_()
    total = merge.sum(gap.sum(-1, keepdim=True))
    head = merge.sum(gap.mul_(in_head(p, mass, merge)).sum(-1, keepdim=True))
    return torch.where(total > 0, head / total.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)


def in_head(p: Distribution, mass: float, merge: Merge) -> Tensor:
    """Return, as 0 and 1, which tokens are the most probable ones with at most `mass` together; at least one is.

    Tokens of one probability go together, as soon as the first of them fits. The place where the mass is reached is
    found by its digits: a histogram of the mass over -log p names the bin, then finer ones of this bin's tokens alone.
    """
    rows, eps = len(p.logs), torch.finfo(p.logs.dtype).eps
    beyond, reached, width = -p.logs, p.logs.new_zeros(rows, 1), _DEPTH
    full, reached = _full_bins(beyond, p.probs, None, reached, width, mass, merge)
    width /= _BINS
    beyond.sub_(full * width)  # negative: inside
    row, token = ((beyond >= 0) & (beyond < width)).nonzero().unbind(1)
    near, probs = beyond[row, token], p.probs[row, token]
    while width > _DEPTH * eps / 4:
        full, reached = _full_bins(near, probs, row, reached, width, mass, merge)
        width /= _BINS
        near.sub_(full[row, 0] * width)
    first = probs.new_zeros(rows).scatter_reduce_(0, row, probs.masked_fill(near < 0, 0.0), "amax")
    last = torch.where((reached == 0) | (reached + merge.max(first[:, None]) <= mass), width, 0.0)
    inside = (beyond < 0).to(beyond.dtype)
    inside[row, token] = (near < last[row, 0]).to(inside.dtype)
    return inside


def _full_bins(
    beyond: Tensor, probs: Tensor, row: Tensor | None, reached: Tensor, width: float, mass: float, merge: Merge
) -> tuple[Tensor, Tensor]:
    """Return how many bins of [0, width) fit into `mass` after what is `reached` (`[n, 1]`), and what they reach.

    The tokens are `[n, vocab]`, or in one list with the row of each.
    """
    bins = _BINS + 2  # what lies before and behind goes into two more
    # A teacher that is not a number gives no number, and not a place that is none.
    places = torch.add(1, beyond, alpha=_BINS / width).nan_to_num_(0.0).clamp_(0, bins - 1).long()
    masses = torch.zeros(len(reached), bins, dtype=probs.dtype, device=probs.device)
    if row is None:
        masses.scatter_add_(1, places, probs)
    else:
        masses.view(-1).scatter_add_(0, places.add_(row, alpha=bins), probs)
    cumulative = reached + merge.sum(masses)[:, 1:-1].cumsum(-1)
    full = (cumulative <= mass).sum(-1, keepdim=True)
    return full, torch.where(full > 0, cumulative.gather(-1, (full - 1).clamp(min=0)), reached)
