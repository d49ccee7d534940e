"""OwnLoss: the Section of a method whose objective is its own, so that a recipe names no `losses` beside it."""

from collections.abc import Sequence
from typing import Any

from kdlm.losses import Loss
from kdlm.section import Section


class OwnLoss(Section):
    """Comes first among the bases of a Section that builds a method."""

    def build(self, losses: Sequence[Loss], vocab: Any) -> Any:
        """Return the method. Raises ValueError where the recipe names losses."""
        if losses:
            raise ValueError(f"losses: {self.name} has a loss of its own: leave them out")  # pyright: ignore
        return super().build(losses, vocab)  # pyright: ignore[reportAttributeAccessIssue]
