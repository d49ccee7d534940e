"""What can be opened here: models and data that are on this machine, or on a hub that can be reached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdlm.data.sources import HUB_ID
from kdlm.models import Fresh, Pruned, Sandbox
from kdlm.sandbox import is_built


def opened(read: Callable[[], Any], model: Any) -> tuple[Any, str]:
    """Return what `read` reads, or None and why not: a sandbox model not built yet, a hub that cannot be reached."""
    source = model.source if isinstance(model, Pruned) else getattr(model, "of", None) or model
    if name := source.model if isinstance(source, Sandbox) else getattr(source, "in_sandbox", None):
        return (read(), "") if is_built(name) else (None, "the sandbox has not built it yet")
    try:
        return read(), ""
    except ValueError as error:
        if looks_like_hub_id(source.config_from if isinstance(source, Fresh) else str(source.path)):
            return None, str(error)
        raise


def looks_like_hub_id(path: str) -> bool:
    """Whether this is no path of this machine and could name something on the hub."""
    if path.startswith((".", "/", "~")):
        return False
    return not Path(path).suffix.lstrip(".").isalpha() and not Path(path).exists() and bool(HUB_ID.fullmatch(path))
