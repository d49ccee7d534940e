"""What every test runs under: one torch thread, no hub, caches in a folder of this session, fixed seeds.

The environment is set when this file is imported, because triton and the Hugging Face libraries read it at import.
"""

import os
import random
import shutil
import tempfile
from pathlib import Path

# xdist workers inherit the environment of the process that started them, and so share its caches.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
CACHE = Path(os.environ["KDLM_CACHE"]).parent if WORKER else Path(tempfile.mkdtemp(prefix="kdlm-tests-"))
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(CACHE / "huggingface"),
    "HF_DATASETS_CACHE": str(CACHE / "datasets"),
    "KDLM_CACHE": str(CACHE / "kdlm"),
    "MPLBACKEND": "Agg",
    "TRACKIO_DIR": str(CACHE / "trackio"),
}

import jaxtyping  # noqa: E402
import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on CPU tensors; triton is not imported yet

torch.set_num_threads(1)  # tiny networks lose an order of magnitude to thread hand-over


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Give every test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test hand over wrong shapes or types on purpose, to see kdlm's own error and not the checker's."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, with the reason in the summary."""
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_unconfigure() -> None:
    """Remove the caches of this session."""
    if not WORKER:
        shutil.rmtree(CACHE, ignore_errors=True)
