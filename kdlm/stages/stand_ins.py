"""What stands for that which an earlier stage will leave, while stages are looked at before any has run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch

from kdlm.looking import opened


def of_student(student: Any, folder: Path) -> str:
    """Write what is known of the student that a stage will leave, all but its weights; return why it cannot be."""
    if not hasattr(student, "tokenizer") or not callable(getattr(student, "config", None)):
        return f"what the stage leaves of {student.name} is known when it has run"
    try:
        found, why = opened(lambda: (student.config(), student.tokenizer()), student)
    except ValueError as error:  # said of the stage itself already
        return str(error)
    if found is None:
        return why
    config, tokenizer = found
    if getattr(student, "dtype", "auto") != "auto":
        config.dtype = getattr(torch, student.dtype)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if hasattr(student, "processor"):
        student.processor().save_pretrained(folder)
    return ""


def of_rows(columns: Sequence[str], path: Path) -> None:
    """Write a row of the columns that a pipeline will leave, for what looks at columns alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table({name: [""] for name in columns}), path)
