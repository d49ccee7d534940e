"""Features: the outputs of a network's inner modules by their dotted paths, and what makes those of two comparable."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

LEADING = 5
"""The most tokens that lead those of the image: of the class and four registers."""


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


@contextmanager
def passed(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Keep what goes into the modules at `paths` (the first argument) and what they return, in the graph.

    A module that is run several times, on one part of a batch after another, has the parts joined. As `recorded` else.
    """
    seen: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}
    joined: dict[str, tuple[Any, Any]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[path].append((args[0], output[0] if isinstance(output, tuple) else output))
            given, gave = zip(*seen[path], strict=True)
            joined[path] = (given[0], gave[0]) if len(given) == 1 else (torch.cat(given), torch.cat(gave))

        return hook

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(module_at(model, path).register_forward_hook(keep(path)).remove)
        yield joined
    if missing := [path for path in paths if path not in joined]:
        raise ValueError(f"the module {missing[0]!r} of {type(model).__name__} was not run in the forward pass")


@contextmanager
def fed(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Give the modules at these paths other first arguments than they are called with, while the context is open."""
    with ExitStack() as hooks:
        for path, value in inputs.items():
            handle = module_at(model, path).register_forward_pre_hook(lambda _, args, v=value: (v, *args[1:]))
            hooks.callback(handle.remove)
        yield


class _Reached(Exception):
    pass


def run_until(model: nn.Module, path: str, *inputs: Any, **options: Any) -> Any:
    """Call a network, but run it only as far as the module at `path`; return what that gives (of a tuple the first).

    Raises ValueError for a path that is no module, and for a module that is not run.
    """
    features: dict[str, Any] = {}

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        _keep(features, path)(module, args, output)
        raise _Reached

    handle = module_at(model, path).register_forward_hook(stop)
    try:
        model(*inputs, **options)
    except _Reached:
        return features[path]
    finally:
        handle.remove()
    raise ValueError(f"the module {path!r} of {type(model).__name__} was not run in the forward pass")


def _keep(features: dict[str, Any], path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        features[path] = output[0] if isinstance(output, tuple) else output

    return hook


def as_map(feature: Any) -> Float[Tensor, "batch channels height width"]:
    """Return features with their places on a grid; tokens `[batch, tokens, width]` are laid out as a square.

    Tokens that lead the others (of the class, of distillation, registers) are left out. Raises ValueError where at most
    5 such tokens do not make the rest a square, and for what has no places.
    """
    x = _checked(feature)
    if x.dim() == 4:
        return x
    side = math.isqrt(x.shape[1]) if x.dim() == 3 else 0
    if side == 0 or x.shape[1] - side * side > LEADING:
        raise ValueError(f"features of shape {list(x.shape)} are no map, nor tokens that make a square")
    return x[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def as_vector(feature: Any) -> Float[Tensor, "batch width"]:
    """Return one vector for each row: the mean over the places of a map, or over tokens."""
    x = _checked(feature)
    return x if x.dim() == 2 else x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


def aligned(student: Any, teacher: Any) -> tuple[Float[Tensor, "batch n ours"], Float[Tensor, "batch n theirs"]]:
    """Return the features of two networks at the same places, the channels last.

    Tokens of equal number correspond as they are; else both become maps and the larger is averaged down to the smaller.
    Where one side is a vector, the other becomes one.
    """
    student, teacher = _checked(student), _checked(teacher)
    if 2 in (student.dim(), teacher.dim()):
        return as_vector(student)[:, None], as_vector(teacher)[:, None]
    if student.dim() == teacher.dim() == 3 and student.shape[1] == teacher.shape[1]:
        return student, teacher
    student, teacher = as_map(student), as_map(teacher)
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    ours, theirs = (adaptive_avg_pool2d(x, size).flatten(2).transpose(1, 2) for x in (student, teacher))
    return ours, theirs


def width_of(feature: Any) -> int:
    """Return the number of channels of a feature: of maps `[batch, channels, height, width]` the second size."""
    x = _checked(feature)
    return x.shape[1] if x.dim() == 4 else x.shape[-1]


def _checked(feature: Any) -> Tensor:
    if not isinstance(feature, Tensor) or feature.dim() not in (2, 3, 4):
        what = f"a tensor of shape {list(feature.shape)}" if isinstance(feature, Tensor) else type(feature).__name__
        raise ValueError(f"a module gave {what}, not vectors, tokens or maps: name a module inside it")
    return feature
