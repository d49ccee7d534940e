"""Ways to spread a run over ranks: what each shares out, and which one a recipe asks for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlm.recipe import Recipe


@dataclass(frozen=True)
class Strategy:
    """What the ranks share out, so that each holds its share alone: weights, gradients, the optimiser's state."""

    name: str
    weights: bool = False
    gradients: bool = False
    optimiser: bool = False

    @property
    def zero(self) -> bool:
        """Whether it is DeepSpeed's."""
        return self.name.startswith("zero")


STRATEGIES = {
    one.name: one
    for one in (
        Strategy("ddp"),
        Strategy("fsdp2", weights=True, gradients=True, optimiser=True),
        Strategy("zero1", optimiser=True),
        Strategy("zero2", optimiser=True, gradients=True),
        Strategy("zero3", weights=True, gradients=True, optimiser=True),
    )
}


def strategy_of(recipe: Recipe) -> Strategy:
    """Return the strategy that a recipe's training arguments come to; accelerate's launcher may ask for another."""
    given: Any = recipe.training
    if given.deepspeed:
        said = given.deepspeed
        config = said if isinstance(said, Mapping) else json.loads(Path(said).read_text())
        return STRATEGIES[f"zero{config['zero_optimization']['stage']}"]
    return STRATEGIES["fsdp2" if given.fsdp else "ddp"]
