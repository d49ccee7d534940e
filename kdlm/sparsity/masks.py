"""Masks: which weights go, by their scores, of all rows of a layer wherever they are."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kdlm.sparsity.section import SparsitySection

Masks = dict[str, Bool[Tensor, "out in"]]
"""Name of a linear layer -> where its weight is pruned, in the rows that this rank holds."""


def masks_of(
    scores: Mapping[str, Float[Tensor, "out in"]],
    before: Mapping[str, Tensor],
    section: SparsitySection,
    share: float,
    others: dist.ProcessGroup | None = None,
) -> Masks:
    """Return where weights are pruned at this share: those with the lowest scores, and all that were before.

    Exactly `round(share * weights)` of each row, layer or of all, as the section's scope has it. Of equal scores the
    first goes, so that the same weights give the same masks on every machine. On the way to n:m only weights go that
    n:m has no place for: each group's m - n lowest.

    Args:
        scores: none is negative.
        before: where weights are pruned by now.
        section: scope and pattern.
        share: of the weights, that are pruned then.
        others: the ranks that hold all rows between them, each the next ones; every rank must ask. None where this one
            has them all.

    Raises ValueError, naming the layer, where rows are no whole number of groups.
    """
    ranked = {name: _ranked(name, value, before.get(name), section.kept_of) for name, value in scores.items()}
    if section.scope == "row":
        return {name: _lowest(value, share) for name, value in ranked.items()}
    if section.scope == "layer":
        return {name: _lowest_together([value], share, others)[0] for name, value in ranked.items()}
    return dict(zip(ranked, _lowest_together([*ranked.values()], share, others), strict=True))


def follows(weight: Float[Tensor, "out in"], kept: int, group: int) -> bool:
    """Whether at most `kept` of each `group` neighbours in a row are not zero."""
    return weight.shape[1] % group == 0 and bool(((weight != 0).view(-1, group).sum(-1) <= kept).all())


def _ranked(name: str, scores: Tensor, before: Tensor | None, kept_of: tuple[int, int] | None) -> Tensor:
    """Return scores by which the lowest go: below all others where pruned before, infinite where none may go."""
    scores = scores.detach().float()
    scores = scores.masked_fill(before, -1.0) if before is not None else scores
    if kept_of is None:
        return scores
    kept, group = kept_of
    if scores.shape[1] % group:
        raise ValueError(
            f"sparsity.pattern: rows of {name} have {scores.shape[1]} weights, which {group} do not divide"
        )
    grouped = scores.unflatten(1, (-1, group))
    stays = grouped.argsort(dim=-1, stable=True)[..., group - kept :]
    return grouped.scatter(-1, stays, torch.inf).view_as(scores)


def _lowest(scores: Float[Tensor, "rows n"], share: float) -> Bool[Tensor, "rows n"]:
    """Return where each row's `round(share * n)` lowest are."""
    count = round(share * scores.shape[-1])
    lowest = scores.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, lowest, True)


def _lowest_together(
    parts: list[Float[Tensor, "rows in"]], share: float, others: dist.ProcessGroup | None
) -> list[Bool[Tensor, "rows in"]]:
    """Return where the `round(share * all)` lowest of all parts of all ranks are.

    The highest of them is found by halving the numbers that it can be: a float that is not negative is greater where
    its bits are (IEEE 754), and -1 is below. Of those that equal it the first go, by part, rank and place.
    """
    bits = [part.view(torch.int32) for part in parts]
    wanted = round(share * _over(others, torch.tensor(sum(part.numel() for part in parts), device=parts[0].device)))
    low, high = (int(torch.tensor(end).view(torch.int32)) for end in (-1.0, torch.inf))
    while low < high:
        middle = (low + high) // 2
        if _over(others, _sums([part <= middle for part in bits]).sum()) >= wanted:
            high = middle
        else:
            low = middle + 1
    below, equal = [part < high for part in bits], [part == high for part in bits]
    left = wanted - _over(others, _sums(below).sum())
    earlier = _earlier(_sums(equal), others)
    return [
        gone | (alike & (alike.flatten().cumsum(0).view_as(alike) + start <= left))
        for gone, alike, start in zip(below, equal, earlier, strict=True)
    ]


def _sums(parts: list[Bool[Tensor, "rows in"]]) -> Int[Tensor, "parts"]:
    return torch.stack([part.sum() for part in parts])


def _over(others: dist.ProcessGroup | None, count: Tensor) -> int:
    """Return a count of all ranks."""
    if others is not None:
        dist.all_reduce(count, group=others)
    return int(count)


def _earlier(counts: Int[Tensor, "parts"], others: dist.ProcessGroup | None) -> Int[Tensor, "parts"]:
    """Return how many are counted before each of this rank's parts: in earlier parts, and in this by earlier ranks."""
    every, rank = [counts], 0
    if others is not None:
        every, rank = [torch.empty_like(counts) for _ in range(dist.get_world_size(others))], dist.get_rank(others)
        dist.all_gather(every, counts, group=others)
    table = torch.stack(every, dim=1)
    return (table.flatten().cumsum(0).view_as(table) - table)[:, rank]
