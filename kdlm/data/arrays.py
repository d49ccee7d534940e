"""Samples made beforehand, such as the latents of an autoencoder: rows of arrays from files on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdlm.data.cache import fingerprint
from kdlm.data.collate import stacked
from kdlm.data.images import TensorRows
from kdlm.data.load import Data
from kdlm.data.report import DataReport
from kdlm.disk import digest_of_file
from kdlm.section import Section

COLUMNS = ("samples", "labels", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
"""What is read of a file; `samples` must be there."""


def _npy(path: Path) -> dict[str, Tensor]:
    found = np.load(path, allow_pickle=False)
    arrays = {"samples": found} if isinstance(found, np.ndarray) else dict(found)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _parquet(path: Path) -> dict[str, Tensor]:
    file = pyarrow.parquet.ParquetFile(path)
    table = file.read(columns=[name for name in COLUMNS if name in file.schema_arrow.names])
    return {name: torch.from_numpy(_dense(table[name], name)) for name in table.column_names}


def _dense(column: Any, name: str) -> np.ndarray:
    """Return a column of numbers, or of nested lists of equal lengths, as an array."""
    lists = pyarrow.ListType | pyarrow.LargeListType | pyarrow.FixedSizeListType
    shape = [len(column)]
    while isinstance(column.type, lists):
        sizes = pyarrow.compute.list_value_length(column).unique().to_pylist()
        if len(sizes) != 1 or sizes[0] is None:
            raise ValueError(f"the rows of `{name}` differ in shape ({', '.join(map(str, sizes))})")
        shape.append(sizes[0])
        column = pyarrow.compute.list_flatten(column)
    if column.null_count:
        raise ValueError(f"`{name}` has empty values")
    return np.array(column.to_numpy()).reshape(shape)


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": load_file,
    ".npy": _npy,
    ".npz": _npy,
    ".parquet": _parquet,
}


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """Return the columns of a file: of a `.npy` its one array as `samples`, else those named as in `COLUMNS`.

    Raises ValueError, naming the file, when it is not there, not of its format, without rows or `samples`, or when its
    columns do not fit together.
    """
    file = Path(path).expanduser()
    if file.suffix not in READERS:
        raise ValueError(f"{path}: samples are read from {', '.join(READERS)}, and this is none of them")
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found = READERS[file.suffix](file)
    except (OSError, ValueError, TypeError, SafetensorError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read as {file.suffix[1:]}: {str(error).splitlines()[0]}") from error
    if "samples" not in found:
        raise ValueError(f"{path}: no column `samples`")
    columns = {name: found[name] for name in COLUMNS if name in found}
    counts = {name: len(column) if column.dim() else 0 for name, column in columns.items()}
    if len(set(counts.values())) > 1 or not counts["samples"]:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"{path}: every column must have as many rows as `samples`, and not none: {said}")
    return {name: _checked(column, name, path) for name, column in columns.items()}


def _checked(column: Tensor, name: str, path: str | Path) -> Tensor:
    """Return a column of the kind of numbers that it must be. Raises ValueError when it is not."""
    if name in ("labels", "encoder_attention_mask"):
        if column.is_floating_point():
            raise ValueError(f"{path}: `{name}` must be whole numbers, not {str(column.dtype).removeprefix('torch.')}")
        return column.long()
    if not column.is_floating_point():
        raise ValueError(f"{path}: `{name}` must be floating-point numbers; scale bytes to what the model takes")
    if not bool(column.isfinite().all()):
        row = int((~column.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{path} row {row}: `{name}` holds a value that is no finite number")
    return column


class SamplesSection(Section):
    """Samples made beforehand: points, images, or latents already scaled as the model takes them."""

    provides: ClassVar[frozenset[str]] = frozenset({"samples"})
    """What a method may need of it."""

    name: Literal["samples"] = "samples"
    train: list[str] = Field(min_length=1)
    """Files, one below the other: `.safetensors`, `.npz` or `.parquet` with a column `samples`, and as far as the model
    is told of them `labels`, `encoder_hidden_states`, `encoder_attention_mask`, `pooled_projections`; or `.npy`, which
    is `samples` alone."""
    eval: list[str] | None = Field(None, min_length=1)
    """The same, to evaluate on."""

    def load(self, seed: int) -> Data:
        """Return the splits. Raises ValueError, naming the file, when one cannot be used."""
        files = {name: paths for name in ("train", "eval") if (paths := getattr(self, name))}
        splits = {name: _joined(paths) for name, paths in files.items()}
        if "eval" in splits:
            _same(splits["train"], self.train[0], splits["eval"], files["eval"][0])
        notes = [_described(name, columns) for name, columns in splits.items()]
        names = {name: fingerprint(*map(digest_of_file, map(_path, paths))) for name, paths in files.items()}
        rows = {name: TensorRows(columns) for name, columns in splits.items()}
        return Data(rows["train"], rows.get("eval"), stacked, DataReport([], notes=notes), names, {})

    def look(self) -> list[str]:
        """Return a line for each split. Raises ValueError when a file is not there."""
        for path in [*self.train, *(self.eval or [])]:
            if not _path(path).is_file():
                raise ValueError(f"{path}: no such file")
        return [f"data: {key}: {', '.join(paths)}" for key in ("train", "eval") if (paths := getattr(self, key))]


def _path(path: str) -> Path:
    return Path(path).expanduser()


def _joined(paths: list[str]) -> dict[str, Tensor]:
    """Return the rows of all files, numbered in `index`."""
    found = [read_arrays(path) for path in paths]
    for path, columns in zip(paths[1:], found[1:], strict=True):
        _same(found[0], paths[0], columns, path)
    joined = {name: torch.cat([columns[name] for columns in found]) for name in found[0]}
    return {**joined, "index": torch.arange(len(joined["samples"]))}


def _same(first: dict[str, Tensor], one: str, second: dict[str, Tensor], other: str) -> None:
    shapes = [{name: list(column.shape[1:]) for name, column in columns.items()} for columns in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{other}: columns and shapes {shapes[1]} differ from {shapes[0]} of {one}")


def _described(name: str, columns: dict[str, Tensor]) -> str:
    shape = " x ".join(map(str, columns["samples"].shape[1:]))
    told = ", ".join(key for key in columns if key not in ("samples", "index"))
    return f"{name}: {len(columns['index'])} samples of {shape}{f', with {told}' if told else ''}"
