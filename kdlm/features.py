"""Features: the outputs of a network's inner modules, by their dotted paths."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

from torch import nn


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path. Raises ValueError where there is none, with the nearest paths."""
    modules = dict(model.named_modules())
    if path not in modules or not path:
        close = get_close_matches(path, [name for name in modules if name], n=3, cutoff=0.3)
        hint = f"; the nearest are {', '.join(close)}" if close else ""
        raise ValueError(f"{type(model).__name__} has no module {path!r}{hint}")
    return modules[path]


@contextmanager
def recorded(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Keep what the modules at `paths` return (of a tuple its first part), in the graph, while the context is open.

    Raises ValueError for a path that is no module, and at the end for a module that was not run.
    """
    features: dict[str, Any] = {}
    with ExitStack() as hooks:
        for path in paths:
            handle = module_at(model, path).register_forward_hook(_keep(features, path))
            hooks.callback(handle.remove)
        yield features
    if missing := [path for path in paths if path not in features]:
        raise ValueError(f"the module {missing[0]!r} of {type(model).__name__} was not run in the forward pass")


def _keep(features: dict[str, Any], path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        features[path] = output[0] if isinstance(output, tuple) else output

    return hook
