"""The rows that a method makes before its first step, kept in the run folder so that a resumed run has the same ones.

`prepared/` holds `rows.safetensors`, `made_by.json` and the manifest of a checkpoint; it is written under another name
and renamed, so it is whole or not there.
"""

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from kdlm import checkpoints
from kdlm.data import TensorRows
from kdlm.disk import flush_names, write_text
from kdlm.methods import Method, Preparation

FOLDER, ROWS, MADE_BY = "prepared", "rows.safetensors", "made_by.json"


def prepared_rows(method: Method, context: Preparation, run: Path) -> TensorRows | None:
    """Return the rows that a method makes of the given ones: from the run folder, if they are there already.

    Rows of another method or other options, seed, number of given rows or weights are made anew, and damaged ones too.
    """
    folder, made_by = run / FOLDER, _made_by(method, context)
    if (rows := _read(folder, made_by)) is not None:
        return rows
    with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
        torch.manual_seed(context.seed)
        rows = method.prepare(context)
    if rows is not None:
        _write(rows, folder, made_by)
    return rows


def _read(folder: Path, made_by: str) -> TensorRows | None:
    try:
        checkpoints.verify(folder)
    except ValueError:  # not there, or damaged
        return None
    if (folder / MADE_BY).read_text(encoding="utf-8") != made_by:
        return None
    return TensorRows(safetensors.torch.load_file(folder / ROWS))


def _write(rows: TensorRows, folder: Path, made_by: str) -> None:
    incoming = folder.with_name(f".{folder.name}.incoming")
    for old in (incoming, folder):
        shutil.rmtree(old, ignore_errors=True)
    incoming.mkdir(parents=True)
    columns = {name: column.detach().cpu().contiguous() for name, column in rows.columns.items()}
    safetensors.torch.save_file(columns, incoming / ROWS)
    write_text(incoming / MADE_BY, made_by)
    checkpoints.seal(incoming)
    os.replace(incoming, folder)
    flush_names(folder.parent)


def _made_by(method: Method, context: Preparation) -> str:
    """Return what the rows depend on, as text."""
    modules = {name: getattr(net, "module", net) for name, net in context.nets.items()}
    described = {
        "method": type(method).__name__,
        "options": {name: str(value) for name, value in vars(method).items()},
        "seed": context.seed,
        "rows": len(context.rows) if hasattr(context.rows, "__len__") else None,
        "weights": {n: checkpoints.fingerprint_of(m) for n, m in modules.items() if isinstance(m, nn.Module)},
    }
    return json.dumps(described, indent=1, sort_keys=True)
