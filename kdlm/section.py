"""Section: the base class of every piece of a recipe.

A Section is declared beside the thing it configures, so that reading one file tells both what can be set
and what it does. Unknown keys are errors, values are frozen, limits live in the fields.
"""

from importlib import import_module
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A typed, frozen piece of a recipe. Choices are unions of Sections tagged by their `name` field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Custom(Section):
    """The one escape hatch of a room: `target` names the user's own class or function."""

    name: Literal["custom"] = "custom"
    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:attribute`, importable from the working directory."""
    args: dict[str, Any] = {}
    """Keyword arguments it is called with."""

    def load(self) -> Any:
        """Return the attribute that `target` names. Raises ValueError when it cannot be imported."""
        module, attribute = self.target.split(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import {self.target!r}: {error}") from error
