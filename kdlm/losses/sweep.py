"""One sweep over the rows: the engine under `chunked` and `weighted_sum`.

Two levels. A *chunk* of rows is projected by both heads into two buffers that all chunks share; it is large, because
every chunk reads both heads and reads and writes the head's gradient once. Inside it the loss runs eagerly under
autograd on *blocks* of a few rows, small enough for their temporaries to stay in the processor's cache, and the
gradient to a block's logits overwrites the logits. So gradients exist when forward ends, and four matrix products do
what plain autograd needs four products and half a dozen `[rows, vocab]` tensors for.

Forward cannot know the gradient that will come from above. It assumes that every row will get the same one, as a sum
gives it, and backward multiplies; if the rows turn out to differ, or backward runs a second time, the gradients are
computed again with what came, which is right and costs another pass. Weights of rows known beforehand go in as
`weights`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kdlm.losses import vocabulary
from kdlm.losses.projection import head_gradient, hidden_gradient, product_dtype, project, wide_dtype
from kdlm.losses.vocabulary import Vocab, cut
from kdlm.signal import Dense, Head, Hidden, Sampled, Signal, TopK

Impl = Literal["auto", "torch", "triton"]

_BUFFER_BYTES = {"cpu": 160 << 20, "cuda": 1 << 30}
"""Bytes of the two logit buffers of a chunk."""
_CPU_BLOCK = 1 << 20
"""Logits per block on a CPU: 4 MiB for each of the handful of temporaries of a divergence. Smaller ones would stay in
a smaller cache, and cost a thread barrier each, which is what hurts where cores are shared."""


def sweep(
    loss: Callable[..., Any],
    student: Hidden | Dense,
    teacher: Signal | None,
    *rowwise: Shaped[Tensor, "rows *rest"],
    vocab: Vocab,
    weights: Float[Tensor, "rows"] | None = None,
    chunk_rows: int | None = None,
    has_aux: bool = False,
    impl: Impl = "auto",
) -> Any:
    """What `chunked` returns, except that only the teacher is cut to `vocab`: `loss` sees all the student's logits."""
    _choose(impl)
    job = _Job(
        loss=loss,
        head=student.head if isinstance(student, Hidden) else None,
        teacher=vocabulary.narrow_teacher(teacher, vocab),
        vocab=vocab,
        rowwise=rowwise,
        weights=None if weights is None else weights.detach(),
        chunk_rows=chunk_rows,
        has_aux=has_aux,
        dtype=product_dtype(student.hidden if isinstance(student, Hidden) else student.logits),
        teacher_dtype=product_dtype(teacher.hidden) if isinstance(teacher, Hidden) else torch.float32,
    )
    inputs = (
        (student.hidden, student.head.weight, student.head.bias)
        if isinstance(student, Hidden)
        else (student.logits, None, None)
    )
    values = _Chunked.apply(job, torch.is_grad_enabled(), *inputs)
    return (values, job.aux) if has_aux else values


def _choose(impl: Impl) -> Literal["torch"]:
    """Pick the implementation: the one place where fused kernels will come in."""
    if impl == "triton":
        raise ValueError("impl='triton': this version of kdlm has no fused kernels; use impl='auto' or impl='torch'")
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    return "torch"


@dataclass
class _Job:
    """What one call computes, whatever the gradient from above; `aux` is filled by the first pass."""

    loss: Callable[..., Any]
    head: Head | None
    teacher: Signal | None
    vocab: Vocab
    rowwise: tuple[Tensor, ...]
    weights: Tensor | None
    chunk_rows: int | None
    has_aux: bool
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    aux: dict[str, Tensor] = field(default_factory=dict)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, enabled, source, weight, bias):
        wanted = [enabled and needed for needed in ctx.needs_input_grad[2:]]
        values, ctx.grads = _run(job, source, weight, bias, job.weights, wanted, job.aux)
        ctx.job = job
        ctx.save_for_backward(source, weight, bias)
        return values

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: chunked losses cannot be differentiated twice, use the eager form")
        grads, ctx.grads = ctx.grads, None
        source, weight, bias = ctx.saved_tensors
        if grads is not None and _is_uniform(upstream):
            grads = [g if g is None or not len(upstream) else g.mul_(upstream[0]) for g in grads]
        else:
            factors = upstream if ctx.job.weights is None else upstream * ctx.job.weights
            grads = _run(ctx.job, source, weight, bias, factors, ctx.needs_input_grad[2:], {})[1]
        inputs = (source, weight, bias)
        return None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _is_uniform(upstream: Tensor) -> bool:
    """Whether all rows get the same gradient. A sum's is expanded, which shows without asking the device."""
    if upstream.stride() == (0,) or len(upstream) <= 1:
        return True
    return bool((upstream == upstream[0]).all())  # waits for the device, far shorter than another pass


def _run(
    job: _Job,
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    wanted: Sequence[bool],
    aux: dict[str, Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the values of all rows times `factors`, and the gradients of their sum to source, weight and bias."""
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        rows, wide = len(source), wide_dtype(job.dtype)
        values = torch.empty(rows, dtype=wide, device=source.device)
        # The first chunk overwrites; without rows there is no first chunk.
        new = torch.empty if rows else torch.zeros
        to_source, to_weight, to_bias = grads = [
            new(x.shape, dtype=wide, device=x.device) if want and x is not None else None
            for x, want in zip((source, weight, bias), wanted, strict=True)
        ]
        size = _rows_at_once(job, source, weight)
        buffer = source.new_empty(0 if weight is None else (size, len(weight)), dtype=wide)
        teacher = _Teacher(job, size)
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            teacher.load(chunk)
            if weight is None:
                z = source[chunk].to(wide) if to_source is None else to_source[chunk].copy_(source[chunk])
                _run_blocks(job, z, teacher, chunk, values, factors, aux, any(wanted))
                continue
            hidden, z = source[chunk].to(job.dtype), buffer[: chunk.stop - start]
            project(z, hidden, weight, bias)
            _run_blocks(job, z, teacher, chunk, values, factors, aux, any(wanted))
            if to_source is not None:
                hidden_gradient(to_source[chunk], z, weight, job.dtype)
            if to_weight is not None:
                head_gradient(to_weight, z, hidden, first=start == 0)
            if to_bias is not None:
                to_bias.copy_(z.sum(0)) if start == 0 else to_bias.add_(z.sum(0))
    return values, grads


def _run_blocks(
    job: _Job,
    z: Tensor,
    teacher: "_Teacher",
    chunk: slice,
    values: Tensor,
    factors: Tensor | None,
    aux: dict[str, Tensor],
    want_grad: bool,
) -> None:
    """Run the loss on the logits `z` of a chunk; fill `values` and `aux`, overwrite `z` with its gradient."""
    step = max(torch.get_num_threads(), _CPU_BLOCK // z.shape[1]) if z.device.type == "cpu" else len(z)
    for at in range(0, len(z), step):
        local = slice(at, min(at + step, len(z)))
        block = slice(chunk.start + local.start, chunk.start + local.stop)
        leaf = z[local].detach().requires_grad_(want_grad)
        with torch.set_grad_enabled(want_grad):
            student = leaf if job.head is None else job.head.transform(leaf)
            result = job.loss(student, teacher.read(block, local), *(x[block] for x in job.rowwise))
        value, extra = result if job.has_aux else (result, {})
        if value.shape != (len(leaf),):
            raise ValueError(f"the loss must return one value per row, [{len(leaf)}], got {list(value.shape)}")
        factor = None if factors is None else factors[block].to(value.dtype)
        values[block] = value.detach() if factor is None else value.detach() * factor
        for name, rows in extra.items():
            aux.setdefault(name, torch.empty_like(values))[block] = rows.detach()
        if want_grad:
            grad = None
            if value.requires_grad:
                upstream = torch.ones_like(value) if factor is None else factor
                (grad,) = torch.autograd.grad(value, leaf, upstream, allow_unused=True)
            z[local] = 0.0 if grad is None else grad


class _Teacher:
    """Reads the teacher's rows block by block; a `Hidden` is projected chunk by chunk into one buffer."""

    def __init__(self, job: _Job, size: int):
        self.signal, self.vocab, self.dtype = job.teacher, job.vocab, job.teacher_dtype
        if isinstance(self.signal, Hidden):
            hidden, head = self.signal.hidden, self.signal.head
            self.logits = torch.empty(size, head.vocab_size, dtype=wide_dtype(self.dtype), device=hidden.device)

    def load(self, chunk: slice) -> None:
        if isinstance(self.signal, Hidden):
            hidden, head = self.signal.hidden[chunk].to(self.dtype), self.signal.head
            project(self.logits[: len(hidden)], hidden, head.weight, head.bias)

    def read(self, block: slice, local: slice) -> Tensor | TopK | Sampled | None:
        """Return the rows at `block` of the signal, which are at `local` of the chunk."""
        match self.signal:
            case Hidden(head=head):
                return cut(head.transform(self.logits[local]), self.vocab)
            case Dense(logits=logits):
                return cut(logits[block].detach(), self.vocab)
            case TopK(ids=ids, log_probs=log_probs):
                return TopK(ids[block], log_probs[block].detach())
            case Sampled(ids=ids, counts=counts):
                return Sampled(ids[block], counts[block].detach())
        return None


def _rows_at_once(job: _Job, source: Tensor, weight: Tensor | None) -> int:
    """Return the rows per chunk: as many as the budget for buffers allows, the same in every chunk."""
    rows = max(1, len(source))
    if job.chunk_rows is not None:
        if job.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {job.chunk_rows}")
        return min(job.chunk_rows, rows)
    columns = (0 if weight is None else len(weight)) + (
        job.teacher.head.vocab_size if isinstance(job.teacher, Hidden) else 0
    )
    if not columns:
        return rows
    budget = _BUFFER_BYTES["cpu" if source.device.type == "cpu" else "cuda"]
    fit = max(16, budget // (columns * wide_dtype(job.dtype).itemsize))
    return math.ceil(rows / math.ceil(rows / fit))
