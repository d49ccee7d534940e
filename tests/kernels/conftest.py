"""What the tests of this room share: every divergence with its options, both implementations, small blocks."""

import pytest
import torch
from kdlm_kernels import Head, triton_rows
from reference import CASES


@pytest.fixture(params=list(CASES))
def case(request):
    """Every divergence, and every limit that has a formula of its own."""
    return CASES[request.param]


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    """Both implementations; on a CPU the kernels run in Triton's interpreter."""
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let vocabularies of a few hundred ids have several blocks and slices, and chunks several blocks of rows."""
    monkeypatch.setattr(triton_rows, "BLOCK", 64)
    monkeypatch.setattr(triton_rows, "PROGRAMS", 8)
    monkeypatch.setitem(triton_rows.blocks.__globals__["BLOCK"], "cpu", 700)


@pytest.fixture
def models():
    """Return a function that makes hidden states and heads: the student's trained, the teacher's not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def build(rows=5, vocab=301, teacher_vocab=None, dtype=torch.float64, bias=True, **shape):
        weight, hidden = normal(vocab, 6, dtype=dtype).requires_grad_(), normal(rows, 6, dtype=dtype).requires_grad_()
        student = Head(weight, normal(vocab, dtype=dtype).requires_grad_() if bias else None, **shape)
        theirs = Head(normal(teacher_vocab or vocab, 9, dtype=dtype), **shape)
        return hidden, student, normal(rows, 9, dtype=dtype), theirs

    return build
