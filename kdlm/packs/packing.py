"""`kdlm pack`: what tuning changed in a model, compressed into a folder that goes on its base."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from kdlm.disk import digest_of_file, write_text
from kdlm.packs.allocation import allocate, survey
from kdlm.packs.compression import Compressed, Dense, LowRank, Shape, as_matrix
from kdlm.packs.difference import Difference
from kdlm.packs.folder import ABOUT, TENSORS, About, Kept
from kdlm.packs.model_folder import open_model
from kdlm.packs.new_folder import new_folder
from kdlm.packs.quantization import to_bits
from kdlm.packs.tensor_files import Kind, TensorFile, header_of, size_of

SHARE = 0.125
LONGEST = 1.23456e-05
"""A relative error that takes as many digits as any does in `pack.json`."""


class Planned(NamedTuple):
    """How a delta will be kept, its rows and columns without the rows of zeros, and its rows with them."""

    how: Compressed | None
    shape: Shape
    rows: int

    def kinds(self) -> dict[str, Kind]:
        """Return type and shape of every tensor that is written for it."""
        if self.how is None:
            return {}
        fewer = self.shape[0] < self.rows
        return self.how.kinds(self.shape) | ({"rows": ("U8", (-(-self.rows // 8),))} if fewer else {})


def pack(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    share: float | None = None,
    rank: int | Literal["full"] | None = None,
    device: str = "auto",
) -> list[str]:
    """Write the difference of two models as a pack and return lines that say what was kept.

    Both models are read three times, one tensor at a time: for their checksums, to settle how each delta is kept, to
    write. Memory is that of the largest tensor, a few times, and not of the models.

    Args:
        base, tuned: folder, hub id, or `sandbox:code-teacher`; two models of one architecture.
        output: the folder to write, which may not be there.
        share: bytes of the whole folder, over those of the deltas in the base's own data types. By default 1/8.
        rank: instead, cut every delta at this rank and keep its factors in float32, with no rounding; `full` keeps
            the deltas as they are.
        device: where decompositions are computed; `auto` is the first GPU if there is one.

    Raises ValueError where the models do not fit each other, nothing differs, or the budget is too small.
    """
    from kdlm.models import device_of

    if share is not None and rank is not None:
        raise ValueError("--share and --rank exclude each other: one sets the bytes, the other the rank")
    place = device_of(device)
    with new_folder(Path(output)) as folder:
        difference = Difference(open_model(tuned), open_model(base))
        if not difference.changed:
            raise ValueError(f"{tuned} does not differ from {base}: there is nothing to pack")
        if rank is not None:
            plan = _cut(difference, rank)
        else:
            plan = _shared(difference, int((share or SHARE) * difference.delta_bytes), place)
        kept, error = _write(difference, plan, folder / TENSORS, place)
        about = _about(difference, kept, error, digest_of_file(folder / TENSORS))
        write_text(folder / ABOUT, about.model_dump_json())
        taken = sum(path.stat().st_size for path in folder.iterdir())
    return [*_told(about, difference, taken), f"wrote {output}; next: kdlm merge {base} {output} --output FOLDER"]


def _matrices(difference: Difference, place: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each delta as a matrix without its rows of zeros, and which rows of the whole these are."""
    for name in track(difference.changed, "kdlm pack", transient=True, disable=not sys.stderr.isatty()):
        delta = difference.delta(name)
        assert delta is not None
        whole = as_matrix(delta.to(place))
        filled = whole.any(dim=1)
        yield name, whole if filled.all() else whole[filled], filled


def _is_vector(difference: Difference, name: str) -> bool:
    return len(difference.base.kind(name)[1]) < 2


def _cut(difference: Difference, rank: int | Literal["full"]) -> dict[str, Planned]:
    """Plan to keep each delta at a rank, or as it is where that takes no more bytes."""
    plan = {}
    for name, matrix, filled in _matrices(difference, torch.device("cpu")):
        shape, exact = (matrix.shape[0], matrix.shape[1]), Dense(bits=32)
        how: Compressed = exact
        if rank != "full" and not _is_vector(difference, name) and rank < min(shape):
            factors = LowRank(bands=((32, rank),))
            how = factors if factors.bytes(shape) < exact.bytes(shape) else exact
        plan[name] = Planned(how, shape, len(filled))
    return plan


def _shared(difference: Difference, budget: int, place: torch.device) -> dict[str, Planned]:
    """Plan to keep the deltas so that the error of all of them is least, in a folder of so many bytes."""
    surveys, rows = {}, {}
    for name, matrix, filled in _matrices(difference, place):
        surveys[name], rows[name] = survey(matrix, _is_vector(difference, name)), len(filled)
    aside = 0
    while True:  # what is said about the deltas takes bytes too, and how many depends on how they are kept
        choices = allocate(surveys, budget - aside)
        plan = {name: Planned(choice.how, surveys[name].shape, rows[name]) for name, choice in choices.items()}
        if (over := _size(difference, plan) - budget) <= 0:
            return plan
        aside += over


def _size(difference: Difference, plan: Mapping[str, Planned]) -> int:
    """Return the bytes of the folder that a plan makes."""
    kept, kinds = {}, _kinds(plan)
    for name, (how, shape, _) in plan.items():
        bytes_ = sum(size_of(kind) for kind in plan[name].kinds().values())
        kept[name] = _kept(difference, name, how, shape, LONGEST, bytes_)
    said = _about(difference, kept, LONGEST, "0" * 16).model_dump_json()
    return len(said) + len(header_of(kinds)[0]) + sum(size_of(kind) for kind in kinds.values())


def _kinds(plan: Mapping[str, Planned]) -> dict[str, Kind]:
    return {f"{name}:{part}": kind for name, each in plan.items() for part, kind in each.kinds().items()}


def _kept(difference: Difference, name: str, how: Compressed | None, shape: Shape, error: float, size: int) -> Kept:
    whole = list(difference.base.kind(name)[1])
    return Kept.model_validate({"shape": whole, "rows": shape[0], "how": how, "relative_error": error, "bytes": size})


def _about(difference: Difference, kept: dict[str, Kept], error: float, checksum: str) -> About:
    return About(
        base=difference.base.fingerprint,
        deltas=kept,
        same_as=difference.same_as,
        unchanged=difference.unchanged,
        delta_bytes=difference.delta_bytes,
        relative_error=error,
        xxh3=checksum,
    )


def _write(
    difference: Difference, plan: Mapping[str, Planned], path: Path, place: torch.device
) -> tuple[dict[str, Kept], float]:
    """Write the deltas; return how each is kept, and the relative error of them all."""
    kept, lost, energy = {}, 0.0, 0.0
    with TensorFile(path, _kinds(plan)) as file:
        for name, matrix, filled in _matrices(difference, place):
            how, shape, rows = plan[name]
            coded = how.encode(matrix) if how else {}
            back = how.decode(coded, shape) if how else torch.zeros(shape)
            error, whole = _square(matrix.cpu() - back), _square(matrix)
            if how and shape[0] < rows:
                coded["rows"] = to_bits(filled)
            file.write_all((f"{name}:{part}", tensor) for part, tensor in coded.items())
            size = sum(tensor.nbytes for tensor in coded.values())
            kept[name] = _kept(difference, name, how, shape, _ratio(error, whole), size)
            lost, energy = lost + error, energy + whole
    return kept, _ratio(lost, energy)


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(lost: float, energy: float) -> float:
    return float(f"{(lost / energy) ** 0.5 if energy else 0.0:.6g}")


def _told(about: About, difference: Difference, taken: int) -> Iterator[str]:
    """Yield what was packed, in lines."""
    kinds: Mapping[str, int] = Counter(kept.how.name if kept.how else "left out" for kept in about.deltas.values())
    yield f"base: {difference.base.called}, tuned: {difference.tuned.called}"
    yield f"tensors: {len(about.deltas)} changed, {len(about.same_as)} copies of them, {len(about.unchanged)} unchanged"
    yield f"kept: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
    yield f"bytes: {taken:,} for {about.delta_bytes:,} of deltas ({taken / about.delta_bytes:.2%})"
    yield f"relative error: {about.relative_error:.3g}"
    yield from (f"note: {note}" for note in difference.notes())
