"""The command line of a benchmark on the CPU: its options, one quiet thread, and the file of its results.

Importing it hides GPUs, and asks for one thread of every library that is imported after it.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from machine import described

RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = {
    "--check": "exit 1 if the gate is missed",
    "--quick": "a smoke test: little is trained",
    "--save": "write the figures into benchmarks/results",
}


def options(doc: str | None) -> argparse.Namespace:
    """Read `check`, `quick` and `save` from the command line; take one thread, and hush transformers.

    Args:
        doc: the benchmark's docstring; its first line describes the command.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for flag, said in FLAGS.items():
        parser.add_argument(flag, action="store_true", help=said)
    args = parser.parse_args()
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return args


def save(name: str, found: dict[str, Any]) -> None:
    """Write what was found into `benchmarks/results/NAME.json`, with the machine that it was found on."""
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": described(), **found}, indent=1) + "\n")
