"""What `kdlm check` looks at of the section `guards`."""

from collections.abc import Iterator
from typing import Any

from kdlm.data import DataSection, ImageTextSection
from kdlm.guards.section import CAUSAL
from kdlm.models import MaskedStudent


def looked_at(recipe: Any, method: Any) -> Iterator[str]:
    """Look at what guards ask of data and rollouts."""
    section = recipe.guards
    if section is None:
        return
    if not isinstance(recipe.data, DataSection | ImageTextSection):
        raise ValueError("guards: they watch language models; remove the section")
    if isinstance(recipe.student, MaskedStudent):
        raise ValueError(CAUSAL)
    section.require(writes=recipe.rollouts is not None, prefers=method is None or "preferences" in method.needs)
    yield f"guards: {', '.join(section.watched)}, every {section.every} steps"
