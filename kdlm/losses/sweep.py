"""Any loss in one sweep over the rows: eager torch under autograd, on a few rows at a time.

The engine (chunks of rows, the four matrix products, gradients made in forward) is `kdlm_kernels.sweep`; this is the
row part for losses that it has no formula for. A chunk's logits are cut into blocks whose temporaries are small, and
the gradient to a block's logits overwrites the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from kdlm_kernels.distribution import blocks
from kdlm_kernels.heads import as_head
from kdlm_kernels.merging import Here
from kdlm_kernels.row_part import Impl, implementation, keep_freed_memory
from kdlm_kernels.sweep import Job
from kdlm_kernels.sweep import sweep as run
from torch import Tensor

from kdlm.losses import slices, vocabulary
from kdlm.losses.blend import Blend
from kdlm.losses.vocabulary import Vocab, cut
from kdlm.signal import Dense, Head, Hidden, Mixture, Sampled, Signal, TopK


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
    """Return what `chunked` returns, except that only the teacher is cut to `vocab`: `loss` sees the whole student."""
    source = student.hidden if isinstance(student, Hidden) else student.logits
    implementation(impl, source.device)
    if impl == "triton":
        what = "a mixture of teachers" if isinstance(teacher, Mixture) else "this loss"
        raise ValueError(f"impl='triton': {what} has no kernel, use impl='auto' or impl='torch'")
    student, teacher = slices.whole(student), vocabulary.narrow_teacher(slices.whole(teacher), vocab)
    hidden = (teacher.hidden.detach(), as_head(teacher.head)) if isinstance(teacher, Hidden) else None
    head = student.head if isinstance(student, Hidden) else None
    blend = Blend(teacher, vocab) if isinstance(teacher, Mixture) else None
    if blend is not None and chunk_rows is None:
        chunk_rows = blend.chunk_rows(source, head)
    job = Job(
        _EagerRows(loss, head, teacher, vocab, rowwise, has_aux, blend),
        as_head(head),
        hidden,
        None if weights is None else weights.detach(),
        chunk_rows,
        Here(),
    )
    values, by_products = run(job, source)
    return (values, by_products) if has_aux else values


@dataclass
class _EagerRows:
    """Runs a loss on the logits of a chunk, block by block (see `kdlm_kernels.sweep.RowPart`)."""

    loss: Callable[..., Any]
    head: Head | None
    teacher: Signal | None
    vocab: Vocab
    rowwise: tuple[Tensor, ...]
    has_aux: bool
    blend: Blend | None

    def __call__(
        self, z: Tensor, y: Tensor | None, at: slice, factors: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keep_freed_memory()
        if self.blend is not None:
            y = self.blend(at)
        values, aux = z.new_empty(len(z)), {}
        widest = max(z.shape[1], 0 if y is None else y.shape[1])
        for local in blocks(len(z), widest, z.device):
            block = slice(at.start + local.start, at.start + local.stop)
            leaf = z[local].detach().requires_grad_(grad is not None)
            with torch.set_grad_enabled(grad is not None):
                student = leaf if self.head is None else self.head.transform(leaf)
                theirs = self._teacher_rows(None if y is None else y[local], block)
                result = self.loss(student, theirs, *(x[block] for x in self.rowwise))
            value, extra = result if self.has_aux else (result, {})
            if value.shape != (len(leaf),):
                raise ValueError(f"the loss must return one value per row, [{len(leaf)}], got {list(value.shape)}")
            values[local] = value.detach()
            for name, rows in extra.items():
                aux.setdefault(name, torch.empty_like(values))[local] = rows.detach()
            if grad is not None:
                upstream = torch.ones_like(value) if factors is None else factors[local].to(value.dtype)
                grad[local] = _gradient(value, leaf, upstream)
        return values, aux

    def _teacher_rows(self, y: Tensor | None, block: slice) -> Tensor | TopK | Sampled | None:
        """Return the teacher's rows as the loss gets them; `y` are the products, or the mixture, of these rows."""
        match self.teacher:
            case Hidden(head=head):
                assert y is not None
                return cut(head.transform(y), self.vocab)
            case Mixture():
                return y
            case Dense(logits=logits):
                return cut(logits[block].detach(), self.vocab)
            case TopK():
                return self.teacher.cut(block)
            case Sampled(ids=ids, counts=counts):
                return Sampled(ids[block], counts[block].detach())
        return None


def _gradient(value: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor | float:
    """Return the gradient to the logits; 0 for a loss that leaves the student out."""
    if not value.requires_grad:
        return 0.0
    (grad,) = torch.autograd.grad(value, leaf, upstream, allow_unused=True)
    return 0.0 if grad is None else grad
