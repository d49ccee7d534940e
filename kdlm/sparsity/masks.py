"""Masks: which weights go, by their scores."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kdlm.sparsity.section import SparsitySection

Masks = dict[str, Bool[Tensor, "out in"]]
"""Name of a linear layer -> where its weight is pruned."""


def masks_of(
    scores: Mapping[str, Float[Tensor, "out in"]], before: Mapping[str, Tensor], section: SparsitySection, share: float
) -> Masks:
    """Return where weights are pruned at this share: those with the lowest scores, and all that were before.

    Exactly `round(share * weights)` of each row, layer or of all, as the section's scope has it. Of equal scores the
    first goes, so that the same weights give the same masks on every machine. On the way to n:m only weights go that
    n:m has no place for: each group's m - n lowest.

    Raises ValueError, naming the layer, where rows are no whole number of groups.
    """
    ranked = {name: _ranked(name, value, before.get(name), section.kept_of) for name, value in scores.items()}
    if section.scope == "global":
        flat = torch.cat([value.flatten() for value in ranked.values()])
        parts = _lowest(flat[None], share)[0].split([value.numel() for value in ranked.values()])
        return {name: part.view_as(ranked[name]) for name, part in zip(ranked, parts, strict=True)}
    if section.scope == "layer":
        return {name: _lowest(value.view(1, -1), share).view_as(value) for name, value in ranked.items()}
    return {name: _lowest(value, share) for name, value in ranked.items()}


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
    grouped = scores.reshape(-1, group)
    stays = grouped.argsort(dim=-1, stable=True)[:, group - kept :]
    return grouped.scatter(-1, stays, torch.inf).view_as(scores)


def _lowest(scores: Float[Tensor, "rows n"], share: float) -> Bool[Tensor, "rows n"]:
    """Return where each row's `round(share * n)` lowest are."""
    count = round(share * scores.shape[-1])
    lowest = scores.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, lowest, True)
