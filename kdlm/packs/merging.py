"""`kdlm merge`: a base and deltas, added up into a plain model folder."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.packs.difference import WIDE, Difference
from kdlm.packs.folder import ABOUT, Pack
from kdlm.packs.model_folder import BESIDE, INDEX, ModelFolder, open_model
from kdlm.packs.new_folder import new_folder
from kdlm.packs.tensor_files import TensorFile


@runtime_checkable
class Deltas(Protocol):
    """What can be added to a base: a `Pack`, or the `Difference` of two models."""

    called: str

    @property
    def names(self) -> set[str]: ...

    def delta(self, name: str) -> Float[Tensor, "..."] | None: ...


def merge(
    base: str | Path,
    parts: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    minus: str | Path | None = None,
    any_base: bool = False,
) -> list[str]:
    """Write base + sum of weight * delta as a folder that `from_pretrained` opens, and return lines to print.

    A part is a pack, or a tuned model, whose delta is the tuned model less `minus`. With `minus` the older base that it
    was tuned from, that is fine-tuning transfer (arXiv 2503.20110): m_target + (m'_source - m_source). With the base
    itself it is task arithmetic (arXiv 2212.04089). Files, their shards, config and tokenizer are the base's. One
    tensor at a time is in memory; sums are formed in float32 and rounded once to the base's data type.

    Args:
        base: folder, hub id, or `sandbox:code-teacher`.
        parts: packs and tuned models.
        output: the folder to write, which may not be there.
        weights: one for each part; by default each is 1.
        minus: the base of the tuned models; by default `base`.
        any_base: put packs on a base that they were not made for.

    Raises ValueError where a part does not fit the base, naming the tensor.
    """
    if weights is not None and len(weights) != len(parts):
        raise ValueError(f"--weights: {len(weights)} for {len(parts)} packs and models, expected one for each")
    with new_folder(Path(output)) as folder:
        target = open_model(base)
        deltas = _opened(parts, target, minus, any_base)
        for path in sorted(target.folder.iterdir()):
            if path.is_file() and (path.name == INDEX or any(fnmatch(path.name, pattern) for pattern in BESIDE)):
                copyfile(path, folder / path.name)
        for file, names in target.files.items():
            kinds = {name: target.kind(name) for name in names}
            with TensorFile(folder / file, kinds, target.metadata(file)) as written:
                for name in names:
                    written.write(name, summed(target, name, deltas, weights or [1.0] * len(deltas)))
    return [f"base: {base}", *_told(deltas, weights, minus or base), f"wrote {output}"]


def _opened(parts: Sequence[str | Path], base: ModelFolder, minus: str | Path | None, any_base: bool) -> list[Deltas]:
    source = base if minus is None else open_model(minus)
    found: list[Deltas] = []
    for part in parts:
        if (Path(part) / ABOUT).is_file():
            pack = Pack(part)
            if not any_base:
                pack.require(base)
            found.append(pack)
        else:
            found.append(Difference(open_model(part), source))
        require_same_names(found[-1], base)
    if minus is not None and not any(isinstance(each, Difference) for each in found):
        raise ValueError("--minus is the base of tuned models, and all that was given are packs: leave it out")
    return found


def require_same_names(deltas: Deltas, base: ModelFolder) -> None:
    """Raise ValueError naming the tensor that only one of the two has."""
    names = set(base.names)
    for name in sorted(names ^ deltas.names):
        has, lacks = (base.called, deltas.called) if name in names else (deltas.called, base.called)
        raise ValueError(f"{name}: in {has}, and {lacks} knows no such tensor: the two are not of one architecture")


def summed(base: ModelFolder, name: str, deltas: Sequence[Deltas], weights: Sequence[float]) -> Tensor:
    """Return a tensor of the base with the weighted deltas added, in the base's data type.

    A tensor that nothing is added to is the base's, bit for bit. Raises ValueError where a shape does not fit.
    """
    tensor, total = base.read(name), None
    for each, weight in zip(deltas, weights, strict=True):
        delta = each.delta(name)
        if delta is None:
            continue
        if delta.shape != tensor.shape or base.kind(name)[0] not in WIDE:
            dtype, shape = base.kind(name)
            raise ValueError(
                f"{name}: {each.called} has {list(delta.shape)} floats to add, {base.called} has {dtype} {list(shape)}"
            )
        part = delta if weight == 1 else delta * weight
        total = part if total is None else total + part
    if total is None:
        return tensor
    exact = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(exact) + total).to(tensor.dtype)


def _told(deltas: Sequence[Deltas], weights: Sequence[float] | None, minus: str | Path) -> Iterator[str]:
    for each, weight in zip(deltas, weights or [1.0] * len(deltas), strict=True):
        less = f" less {minus}" if isinstance(each, Difference) else ""
        yield f"plus {weight:g} times {each.called}{less}"
        if isinstance(each, Difference):
            yield from (f"note: {note}" for note in each.notes())
