"""Weights of an ensemble's members: fixed, by domain, by confidence, or learned on held-out data."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from kdlm.section import Section

Share = Annotated[float, Field(ge=0)]


class ByDomain(Section):
    """Weights that depend on where a sequence comes from."""

    name: Literal["by_domain"] = "by_domain"
    table: dict[str, list[Share]] = Field(min_length=1)
    """Domain -> one weight per member. A source's domain is its `domain`, else its path; a row's may be in a column of
    its own, see `data.train.columns`."""
    default: list[Share] | None = None
    """Weights of the domains that the table does not name; without it they are refused."""


class Confidence(Section):
    """Weights that follow how sure each member is at a position: proportional to exp(-entropy / temperature).

    Entropy in nats, of the member's distribution over the ids that are compared. A choice of kdlm's own.
    """

    name: Literal["confidence"] = "confidence"
    temperature: float = Field(1.0, gt=0)
    """Near 0 the surest member alone counts, the larger the more equal the weights."""


class Learned(Section):
    """Weights that minimise the mixture's cross-entropy on evaluation rows, fitted once before the first step."""

    name: Literal["learned"] = "learned"
    positions: int = Field(4096, ge=1)
    """Positions that they are fitted on, from the evaluation rows' beginning; a few thousand do for a few members."""


Weights = list[Share] | Annotated[ByDomain | Confidence | Learned, Field(discriminator="name")]
"""What a recipe may say: one number per member, or a rule."""


def log_shares(weights: Sequence[float], members: int) -> Float[Tensor, "members"]:
    """Return the logarithms of the weights, scaled to a sum of 1, in float64.

    Raises ValueError unless there is one for each member, none is negative and one is positive.
    """
    if len(weights) != members:
        raise ValueError(f"{len(weights)} weights for {members} members: give one to each")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(f"weights {list(weights)}: none may be negative, and they must not all be 0")
    shares = torch.tensor(weights, dtype=torch.float64)
    return (shares / shares.sum()).log()


def check_weights(weights: "Weights | None", members: int) -> None:
    """Raise ValueError where fixed weights or a table do not fit the number of members."""
    rows = {"weights": weights} if isinstance(weights, list) else {}
    if isinstance(weights, ByDomain):
        rows = {f"weights.table.{domain}": row for domain, row in weights.table.items()}
        rows |= {} if weights.default is None else {"weights.default": weights.default}
    for key, row in rows.items():
        try:
            log_shares(row, members)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
