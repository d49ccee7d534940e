"""The package by itself, its cost model, and its kernels compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kdlm_kernels import Head, linear_divergence, plan_chunks
from kdlm_kernels.row_part import implementation

ROOT = Path(__file__).parents[2]


def test_it_imports_neither_kdlm_nor_triton_nor_transformers():
    code = (
        "import sys, kdlm_kernels; "
        "print([m for m in ('kdlm', 'triton', 'transformers', 'jaxtyping', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_kernel_compiles_ahead_of_time_and_hardly_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "kernel_resources.py", "--quick", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_kernels_give_what_torch_gives(case, dtype):
    name, options = case
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(5003, 64, device="cuda", dtype=dtype) / 4).requires_grad_()
    teacher = torch.randn(300, 96, device="cuda", dtype=dtype), Head(torch.randn(5003, 96, device="cuda", dtype=dtype))
    results = []
    for impl in ("triton", "torch"):
        rows = linear_divergence(hidden, weight, *teacher, divergence=name, impl=impl, chunk_rows=128, **options)
        results.append([rows, *torch.autograd.grad(rows.sum(), (hidden, weight))])
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 0.01 * plain.norm()


def test_auto_is_triton_on_cuda_and_torch_elsewhere():
    assert implementation("auto", torch.device("cuda")) == "triton"
    assert implementation("auto", torch.device("cpu")) == implementation("auto", torch.device("mps")) == "torch"


def test_triton_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr("kdlm_kernels.row_part._interpreted", lambda: False)
    with pytest.raises(ValueError, match="no kernels for cpu"):
        implementation("triton", torch.device("cpu"))
    monkeypatch.setattr("kdlm_kernels.row_part.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        implementation("triton", torch.device("cuda"))
    assert implementation("auto", torch.device("cuda")) == "torch"


QWEN = {"vocab": 151_936, "student_width": 1024, "teacher_width": 4096}


def test_chunks_cover_the_rows_within_their_memory_in_sizes_that_products_like():
    for rows in (1, 1024, 8192, 32_768, 100_003):
        chunks = plan_chunks(rows, **QWEN)
        assert (chunks.number - 1) * chunks.rows < rows <= chunks.number * chunks.rows
        assert chunks.bytes <= 1 << 30
        assert chunks.number == 1 or chunks.rows % 64 == 0
    assert plan_chunks(0, **QWEN).number == 0


def test_more_memory_means_fewer_chunks_up_to_where_they_no_longer_pay():
    tight, roomy = plan_chunks(8192, **QWEN, free=256 << 20), plan_chunks(8192, **QWEN)
    assert tight.rows < roomy.rows and tight.bytes <= 128 << 20 and tight.traffic > roomy.traffic
    small = plan_chunks(100_000, vocab=2048, student_width=256, teacher_width=512)
    assert small.rows < 10_000 and small.bytes < 1 << 28  # all rows would fit, and gain nothing


def test_a_frozen_head_and_an_absent_teacher_leave_room_for_more_rows():
    rows = plan_chunks(32_768, **QWEN).rows
    assert plan_chunks(32_768, **QWEN, trained=False).rows > rows
    assert plan_chunks(32_768, vocab=151_936, student_width=1024).rows > rows
