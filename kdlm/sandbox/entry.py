"""Entry: a thing that the sandbox can build, and what it is made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdlm.sandbox.progress import Progress


class Spec(Protocol):
    """How a thing is made."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what is built before it."""
        ...

    def ingredients(self) -> dict[str, Any]:
        """Return everything that determines it beside what it needs."""
        ...

    def make(self, folder: Path, built: dict[str, Path], progress: Progress, name: str) -> dict[str, Any]:
        """Write it into an empty folder and return the figures worth keeping; `built` holds what it needs."""
        ...


@dataclass(frozen=True)
class Entry:
    """A thing that can be built.

    Attributes:
        what: one line.
        size: parameters, token ids or rows.
        seconds: time it took on one core of a shared machine; a quiet one is quicker.
        spec: what it is made from.
    """

    name: str
    what: str
    size: str
    seconds: float
    spec: Spec
