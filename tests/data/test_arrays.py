"""Samples made beforehand: what is read from files of arrays, and which files are refused."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from kdlm.data import SamplesSection

SAMPLES = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
LABELS = np.array([4, 0, 7])


def written(folder: Path, suffix: str, **columns: np.ndarray) -> str:
    path = folder / f"latents{suffix}"
    if suffix == ".safetensors":
        save_file({name: torch.from_numpy(column) for name, column in columns.items()}, path)
    elif suffix == ".parquet":
        table = pyarrow.table({name: column.tolist() for name, column in columns.items()})
        pyarrow.parquet.write_table(table, path)
    elif suffix == ".npz":
        np.savez(path, **columns)
    else:
        np.save(path, columns["samples"])
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".parquet"])
def test_a_file_gives_its_columns_and_numbers_its_rows(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix, samples=SAMPLES, labels=LABELS, something_else=LABELS + 1)
    data = SamplesSection(train=[path, path], eval=[path]).load(0)
    batch = data.collator([data.train[i] for i in (0, 4)])
    assert set(batch) == {"samples", "labels", "index"} and len(data.train) == 6 and len(data.eval) == 3
    assert batch["labels"].tolist() == [4, 0] and batch["index"].tolist() == [0, 4]
    torch.testing.assert_close(batch["samples"].float(), torch.from_numpy(SAMPLES[[0, 1]]), rtol=0, atol=0)
    assert "train: 6 samples of 2 x 2 x 2, with labels" in str(data.report)


def test_a_single_array_is_samples_alone(tmp_path: Path) -> None:
    data = SamplesSection(train=[written(tmp_path, ".npy", samples=SAMPLES)]).load(0)
    assert set(data.train[0]) == {"samples", "index"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": LABELS}, "no column `samples`"),
        ({"samples": SAMPLES, "labels": LABELS[:2]}, "samples 3, labels 2"),
        ({"samples": SAMPLES[:0]}, "samples 0"),
        ({"samples": SAMPLES, "labels": LABELS.astype(np.float32)}, "`labels` must be whole numbers, not float32"),
        ({"samples": SAMPLES.astype(np.uint8)}, "`samples` must be floating-point numbers"),
        ({"samples": np.where(SAMPLES == 9, np.nan, SAMPLES)}, "row 1: `samples` holds a value that is no finite"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_the_files_name(tmp_path: Path, columns, message: str) -> None:
    path = written(tmp_path, ".safetensors", **columns)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        SamplesSection(train=[path]).load(0)


def test_files_that_are_no_arrays_are_refused_by_name(tmp_path: Path) -> None:
    for suffix in (".safetensors", ".npz", ".npy", ".parquet"):
        (tmp_path / f"broken{suffix}").write_bytes(b"not this")
        with pytest.raises(ValueError, match=f"broken{suffix}: cannot be read as {suffix[1:]}"):
            SamplesSection(train=[str(tmp_path / f"broken{suffix}")]).load(0)
    with pytest.raises(ValueError, match=r"x\.csv: samples are read from \.safetensors"):
        SamplesSection(train=["x.csv"]).load(0)
    with pytest.raises(ValueError, match=r"away\.npy: no such file"):
        SamplesSection(train=["away.npy"]).look()


def test_rows_of_different_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ragged.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"samples": [[1.0, 2.0], [3.0]]}), path)
    with pytest.raises(ValueError, match="the rows of `samples` differ in shape"):
        SamplesSection(train=[str(path)]).load(0)
    first, second = tmp_path / "first.npy", tmp_path / "second.npy"
    np.save(first, SAMPLES)
    np.save(second, SAMPLES[..., :1])
    with pytest.raises(ValueError, match=r"second\.npy: columns and shapes .* differ from .*first\.npy"):
        SamplesSection(train=[str(first)], eval=[str(second)]).load(0)
