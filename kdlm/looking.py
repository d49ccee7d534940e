"""What can be had here: models and data on this machine, or on a hub that can be reached; settings that TRL takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdlm.data.sources import HUB_ID
from kdlm.models import Fresh, Sandbox
from kdlm.sandbox import is_built

SANDBOX = "sandbox:"


def opened(read: Callable[[], Any], model: Any) -> tuple[Any, str]:
    """Return what `read` reads, or None and why not: a sandbox model not built yet, a hub that cannot be reached."""
    parts = _parts(model)
    if not all(is_built(part.removeprefix(SANDBOX)) for part in parts if part.startswith(SANDBOX)):
        return None, "the sandbox has not built it yet"
    try:
        return read(), ""
    except ValueError as error:
        if any(looks_like_hub_id(part) for part in parts if not part.startswith(SANDBOX)):
            return None, str(error)
        raise


def taken_by_trl(read: Callable[[], Any], trainer: str) -> str:
    """Return what is said of a run in one of TRL's trainers, whose settings `read` makes.

    Raises ValueError where it does not take them; that TRL is not here is a note alone.
    """
    try:
        read()
    except ValueError as error:
        if str(error).startswith("method: trl cannot"):
            return f"method: note: {str(error).removeprefix('method: ')}"
        raise ValueError(f"training: {error}") from error
    return f"method: runs in TRL's {trainer}"


def _parts(model: Any) -> list[str]:
    """Return what a model is opened from: hub ids, folders, names in the sandbox."""
    source = getattr(model, "source", None) or getattr(model, "of", None) or model
    tokenizer = [model.tokenizer_from] if source is not model and hasattr(model, "tokenizer_from") else []
    if name := source.model if isinstance(source, Sandbox) else getattr(source, "in_sandbox", None):
        return [SANDBOX + name, *tokenizer]
    return [source.config_from if isinstance(source, Fresh) else str(getattr(source, "path", "")), *tokenizer]


def looks_like_hub_id(path: str) -> bool:
    """Whether this is no path of this machine and could name something on the hub."""
    if path.startswith((".", "/", "~")):
        return False
    return not Path(path).suffix.lstrip(".").isalpha() and not Path(path).exists() and bool(HUB_ID.fullmatch(path))
