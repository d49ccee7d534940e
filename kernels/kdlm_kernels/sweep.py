"""One sweep over the rows: the engine under every token loss.

A *chunk* of rows is projected by both heads into two buffers that all chunks share. The row part turns the student's
logits into values and into their own gradient, and the two products of the gradient follow while it is there. So
gradients exist when forward ends, and four matrix products do what plain autograd needs four products and half a dozen
`[rows, vocab]` tensors for.

Forward cannot know the gradient that will come from above. It assumes that every row will get the same one, as a sum
gives it, and backward multiplies; if the rows turn out to differ, or backward runs a second time, the gradients are
computed again with what came, which is right and costs another sweep. Weights of rows known beforehand go in as
`weights`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from kdlm_kernels.chunks import free_bytes, plan_chunks
from kdlm_kernels.heads import Head
from kdlm_kernels.merging import Here, Merge
from kdlm_kernels.projection import (
    gradient_dtype,
    head_gradient,
    hidden_gradient,
    product_dtype,
    project,
    wide_dtype,
)
from kdlm_kernels.sharding import opened


class RowPart(Protocol):
    """What happens to the logits of a chunk."""

    def __call__(
        self, z: Tensor, y: Tensor | None, at: slice, factors: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the value of each row, and by-products `{name: [n]}`; fill `grad` where there is one.

        Args:
            z: the student's products, `[n, vocab]`, without what the head does afterwards. Not to be written to,
                except where it is `grad` too.
            y: the teacher's, or None. Not to be written to.
            at: which rows these are.
            factors: upstream gradient of each row, None for 1.
            grad: `[n, vocab]` for the gradient to the student's products; may be `z`.
        """
        ...


@dataclass
class Job:
    """What one call computes, whatever the gradient from above.

    Attributes:
        student: the head, or None where the input is logits already.
        teacher: hidden states and head (None: these are logits), or None.
        merge: over slices of the vocabulary.
        by_products: filled by the first sweep.
    """

    rows: RowPart | None
    student: Head | None
    teacher: tuple[Tensor, Head | None] | None
    weights: Tensor | None
    chunk_rows: int | None
    merge: Merge
    by_products: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32


def sweep(job: Job, source: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value of every row, differentiable in `source` and the student's head, and the by-products."""
    values = _Sweep.apply(_prepared(job, source), torch.is_grad_enabled(), source, *_parameters(job))
    return values, job.by_products


def _prepared(job: Job, source: Tensor) -> Job:
    """Fix the dtypes, which autocast decides where the call is made; check the size of a chunk."""
    if job.chunk_rows is not None and job.chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {job.chunk_rows}")
    job.dtype = product_dtype(source)
    if job.teacher is not None:
        job.teacher_dtype = product_dtype(job.teacher[0])
    return job


def _parameters(job: Job) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if job.student is None else job.student[:2]


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job, enabled, source, weight, bias):
        wanted = [enabled and needed for needed in ctx.needs_input_grad[2:]]
        values, ctx.grads = _run(job, source, weight, bias, job.weights, wanted, job.by_products)
        ctx.job = job
        ctx.save_for_backward(source, weight, bias)
        return values

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: fused losses cannot be differentiated twice, use the eager form")
        grads, ctx.grads = ctx.grads, None
        source, weight, bias = ctx.saved_tensors
        if grads is not None and _is_uniform(upstream):
            grads = [g if g is None or not len(upstream) else g.mul_(upstream[0]) for g in grads]
        else:
            factors = upstream if ctx.job.weights is None else upstream * ctx.job.weights
            grads = _run(ctx.job, source, weight, bias, factors, ctx.needs_input_grad[2:], {})[1]
        inputs = (source, weight, bias)
        return None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


class Results(Protocol):
    """Several results per row, whose gradient needs what comes from above each of them."""

    def empty(self, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Allocate the results."""
        ...

    def into(self, results: tuple[Tensor, ...]) -> RowPart:
        """Return the row part that fills them. (It must not outlive the call: they lead back to it.)"""
        ...

    def under(self, upstream: tuple[Tensor | None, ...]) -> RowPart:
        """Return the row part whose gradient is that of `sum(upstream * results)`; None stands for 0."""
        ...


def results_of(results: Results, job: Job, source: Tensor) -> tuple[Tensor, ...]:
    """Return several results per row, differentiable in `source` and the student's head; `job.rows` is not looked at.

    Forward sweeps without gradient, backward again with it.
    """
    return _Twice.apply(results, _prepared(job, source), source, *_parameters(job))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, results, job, source, weight, bias):
        ctx.set_materialize_grads(False)
        ctx.results, ctx.job = results, job
        ctx.save_for_backward(source, weight, bias)
        found = results.empty(len(source), wide_dtype(job.dtype), source.device)
        _run(replace(job, rows=results.into(found)), source, weight, bias, None, (False, False, False), {})
        return found

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: fused losses cannot be differentiated twice, use the eager form")
        inputs = source, weight, bias = ctx.saved_tensors
        job = replace(ctx.job, rows=ctx.results.under(upstream))
        grads = _run(job, source, weight, bias, None, ctx.needs_input_grad[2:], {})[1]
        return None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _is_uniform(upstream: Tensor) -> bool:
    """Whether all rows get the same gradient. A sum's is expanded, which shows without asking the device."""
    if upstream.stride() == (0,) or len(upstream) <= 1:
        return True
    return bool((upstream == upstream[0]).all())  # waits for the device, far shorter than another sweep


def _run(
    job: Job,
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Tensor | None,
    wanted: Sequence[bool],
    by_products: dict[str, Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the values of all rows times `factors`, and the gradients of their sum to source, weight and bias."""
    assert job.rows is not None
    teacher = None if job.teacher is None else job.teacher[1]
    with opened(job.student, teacher), torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        rows, wide = len(source), wide_dtype(job.dtype)
        values = torch.empty(rows, dtype=wide, device=source.device)
        # The first chunk overwrites; without rows there is no first chunk.
        new = torch.empty if rows else torch.zeros
        to_source, to_weight, to_bias = grads = [
            new(x.shape, dtype=wide, device=x.device) if want and x is not None else None
            for x, want in zip((source, weight, bias), wanted, strict=True)
        ]
        size = _chunk_rows(job, source, weight)
        buffers = _Buffers(job, source, weight, size, any(wanted))
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            hidden = source[chunk].to(wide if weight is None else job.dtype)
            if weight is None:
                z = hidden if to_source is None else to_source[chunk].copy_(hidden)
                grad = None if to_source is None else z
            else:
                z, grad = buffers.student(len(hidden))
                project(z, hidden, weight, bias)
            value, extra = job.rows(
                z, buffers.teacher(chunk), chunk, None if factors is None else factors[chunk].to(wide), grad
            )
            values[chunk] = value if factors is None else value * factors[chunk].to(wide)
            for name, found in extra.items():
                by_products.setdefault(name, torch.empty_like(values))[chunk] = found
            if weight is None or grad is None:
                continue
            if to_source is not None:
                hidden_gradient(to_source[chunk], grad, weight, job.dtype)
            if to_weight is not None:
                head_gradient(to_weight, grad, hidden, first=start == 0)
            if to_bias is not None:
                to_bias.copy_(grad.sum(0)) if start == 0 else to_bias.add_(grad.sum(0))
        if to_source is not None and weight is not None:
            job.merge.hidden_gradient(to_source)
    return values, grads


class _Buffers:
    """The logits of a chunk, student's and teacher's, and the student's gradient where it is narrower."""

    def __init__(self, job: Job, source: Tensor, weight: Tensor | None, size: int, graded: bool):
        self.job, self.graded = job, graded
        wide = wide_dtype(job.dtype)
        narrow = gradient_dtype(job.dtype, source.device)
        if weight is not None:
            self.logits = source.new_empty(size, len(weight), dtype=wide)
            self.gradient = self.logits
            if graded and narrow != wide:
                self.gradient = source.new_empty(size, len(weight), dtype=narrow)
        if job.teacher is not None and job.teacher[1] is not None:
            ids, wide = len(job.teacher[1].weight), wide_dtype(job.teacher_dtype)
            self.theirs = job.teacher[0].new_empty(size, ids, dtype=wide)

    def student(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return where `rows` rows of products go, and where their gradient does."""
        return self.logits[:rows], self.gradient[:rows] if self.graded else None

    def teacher(self, chunk: slice) -> Tensor | None:
        """Return the teacher's products at `chunk`."""
        if self.job.teacher is None:
            return None
        hidden, head = self.job.teacher
        if head is None:
            return hidden[chunk]
        hidden = hidden[chunk].to(self.job.teacher_dtype)
        out = self.theirs[: len(hidden)]
        project(out, hidden, head.weight, head.bias)
        return out


def _chunk_rows(job: Job, source: Tensor, weight: Tensor | None) -> int:
    """Return the rows per chunk, the same in every chunk and on all ranks of a group; the user's limit is exact."""
    rows = max(1, len(source))
    if job.chunk_rows is not None:
        return min(job.chunk_rows, rows)
    teacher = None if job.teacher is None or job.teacher[1] is None else job.teacher[1].weight
    if weight is None and teacher is None:
        return rows
    vocab, width = source.shape[-1:] * 2 if weight is None else weight.shape
    size = plan_chunks(
        rows,
        vocab=vocab,
        student_width=width,
        teacher_width=0 if teacher is None else teacher.shape[1],
        teacher_vocab=None if teacher is None else len(teacher),
        itemsize=job.dtype.itemsize,
        device=source.device.type,
        trained=weight is not None and weight.requires_grad,
        free=free_bytes(source.device),
    ).rows
    return size if isinstance(job.merge, Here) else -int(job.merge.max(torch.tensor(-size, device=source.device)))
