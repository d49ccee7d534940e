"""The wrapper in narrow dtypes, mixed ones and under autocast."""

import pytest
import torch
from linear_pair import assert_same, leaves, logits

from kdlm.losses import chunked, forward_kl
from kdlm.signal import Head, Hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_torch(models, dtype):
    student, teacher = models(rows=64, dtype=dtype, bias=True)
    exact = [x.detach().double().requires_grad_() for x in leaves(student)]
    exact_teacher = (teacher.hidden.double() @ teacher.head.weight.double().T).detach()

    def run(loss, inputs):
        value = loss.sum() / len(loss)
        return [loss, *torch.autograd.grad(value, inputs)]

    reference = run(forward_kl(torch.nn.functional.linear(*exact), exact_teacher), exact)
    torchs = run(forward_kl(logits(student), logits(teacher)), leaves(student))
    ours = run(chunked(forward_kl, student, teacher, chunk_rows=9), leaves(student))
    assert ours[0].dtype == torch.float32 and all(x.dtype == dtype for x in ours[1:])
    for mine, plain, right in zip(ours, torchs, reference, strict=True):
        assert (mine - right).norm() <= 2 * (plain - right).norm()
        assert (mine - right).norm() <= 0.01 * right.norm()


def test_a_head_in_another_dtype_than_the_hidden_states_is_converted(models, monkeypatch):
    monkeypatch.setattr("kdlm_kernels.projection._CONVERTED", 100)
    student, teacher = models(dtype=torch.float32)
    half = Hidden(teacher.hidden, Head(teacher.head.weight.bfloat16()))
    whole = Hidden(teacher.hidden, Head(half.head.weight.float()))
    assert_same(chunked(forward_kl, student, half), chunked(forward_kl, student, whole), student)
    mixed = Hidden(student.hidden.detach().bfloat16().requires_grad_(), student.head)
    grads = torch.autograd.grad(chunked(forward_kl, mixed, teacher).sum(), leaves(mixed))
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32]


def test_under_autocast_products_are_narrow_and_the_loss_is_not(models):
    student, teacher = models(rows=64, dtype=torch.float32)
    exact = forward_kl(logits(student), logits(teacher))

    def loss(z_s, z_t):
        assert not torch.is_autocast_enabled("cpu") and z_s.dtype == z_t.dtype == torch.float32
        return forward_kl(z_s, z_t)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = chunked(loss, student, teacher)
        plain = forward_kl(logits(student), logits(teacher))
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()
    grads = torch.autograd.grad(ours.sum(), leaves(student))
    assert all(x.dtype == torch.float32 for x in grads)
    for found, right in zip(grads, torch.autograd.grad(exact.sum(), leaves(student)), strict=True):
        assert (found - right).norm() < 0.02 * right.norm()
