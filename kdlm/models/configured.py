"""A model of one transformers class: a checkpoint, one of the sandbox's, or random weights of a configuration."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import model_validator

from kdlm.models.loading import open_pretrained
from kdlm.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Configured(Section):
    """Where a model comes from; a subclass says of which class, and which names the sandbox knows."""

    kind: ClassVar[str]
    """Name of the class in transformers."""
    sandbox: ClassVar[tuple[str, ...]] = ()
    """What `sandbox:` may name."""

    path: str | None = None
    """Hub id, folder, or `sandbox:` and a name."""
    config: dict[str, Any] | None = None
    """In place of `path`, random weights of this configuration."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights; `auto` takes the checkpoint's own."""
    seed: int = 0
    """Seed of random weights."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Configured":
        if (self.path is None) == (self.config is None):
            raise ValueError("say either path (a checkpoint) or config (random weights)")
        return self

    @property
    def on_this_machine(self) -> bool:
        """Whether its configuration can be read without a network and without building anything."""
        from kdlm.sandbox import is_built

        if self.path is None:
            return True
        return Path(self.path).expanduser().is_dir() if self._in_sandbox is None else is_built(self._in_sandbox)

    def load(self) -> "PreTrainedModel":
        """Open or make the weights. Raises ValueError naming the path when there is no such model."""
        import transformers

        cls = getattr(transformers, self.kind)
        if self.path is not None:
            return open_pretrained(cls, self.location(), dtype=self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = cls(self.configuration())
        return model if self.dtype == "auto" else model.to(getattr(torch, self.dtype))

    def configuration(self) -> Any:
        """Return the configuration: sizes, without weights. Raises ValueError for a value that it does not have."""
        import transformers

        kind = getattr(transformers, self.kind).config_class
        if self.path is not None:
            return open_pretrained(kind, self.location())
        return kind(**self._known_to(kind(), self.config or {}))

    def location(self) -> str:
        """Return the hub id or folder. Builds a sandbox model that is missing: seconds."""
        from kdlm.sandbox import build

        assert self.path is not None
        return self.path if self._in_sandbox is None else str(build(self._in_sandbox))

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        return self.path or f"{self.kind} with random weights"

    @property
    def _in_sandbox(self) -> str | None:
        """The name that the sandbox has for it. Raises ValueError for a sandbox model that there is not."""
        if self.path is None or not self.path.startswith("sandbox:"):
            return None
        name = self.path.removeprefix("sandbox:")
        if name not in self.sandbox:
            raise ValueError(f"the sandbox has no {self.kind} {name!r}. It has: {', '.join(self.sandbox)}")
        return name

    def _known_to(self, config: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values. Raises ValueError for one that the configuration does not have."""
        if unknown := [key for key in values if not hasattr(config, key)]:
            raise ValueError(f"config: {type(config).__name__} has no {', '.join(unknown)}")
        return values
