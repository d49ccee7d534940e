"""Samplers: which training rows an epoch trains on, where that is not each of them once."""

from typing import Annotated

from pydantic import Field

from kdlm.samplers.ddk import DomainGaps, DomainOrder, next_shares
from kdlm.samplers.drawing import DrawnRows
from kdlm.samplers.order import Order
from kdlm.samplers.subsets import FixedOrder, FixedSubset, RepeatedOrder, RepeatedSubsets, tied

AnySampler = Annotated[DomainGaps | RepeatedSubsets | FixedSubset, Field(discriminator="name")]
"""How a recipe has its training rows drawn."""

__all__ = [
    "AnySampler",
    "DomainGaps",
    "DomainOrder",
    "DrawnRows",
    "FixedOrder",
    "FixedSubset",
    "Order",
    "RepeatedOrder",
    "RepeatedSubsets",
    "next_shares",
    "tied",
]
