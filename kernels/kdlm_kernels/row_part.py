"""The row part of a fused loss: by-products, and the formulas in torch or in Triton."""

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kdlm_kernels import formulas
from kdlm_kernels.distribution import blocks
from kdlm_kernels.formulas import Plan
from kdlm_kernels.merging import Here, Merge
from kdlm_kernels.terms import Term

Impl = Literal["auto", "torch", "triton"]


def implementation(impl: Impl, device: torch.device) -> Literal["torch", "triton"]:
    """Return what `impl` means on a device: Triton on CUDA where it is installed.

    Raises ValueError for an unknown name, and for "triton" where it cannot run (on a CPU it needs its interpreter,
    TRITON_INTERPRET=1 in the environment before it is imported).
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    installed = find_spec("triton") is not None
    if impl == "auto":
        return "triton" if device.type == "cuda" and installed else "torch"
    if impl == "triton":
        if not installed:
            raise ValueError("impl='triton': triton is not installed (pip install triton), use impl='auto'")
        if device.type != "cuda" and not _interpreted():
            raise ValueError(f"impl='triton': there are no kernels for {device.type}, use impl='auto' or impl='torch'")
    return impl


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


class FusedRows:
    """Fills values, by-products and gradient of a chunk (see `sweep.RowPart`).

    Args:
        terms: in the order of the plan's first formulas.
        labels: the next token of every row of the call.
    """

    def __init__(
        self,
        plan: Plan,
        terms: Sequence[Term],
        labels: Tensor | None,
        impl: Literal["torch", "triton"],
        merge: Merge | None = None,
    ):
        self.plan, self.labels, self.impl, self.merge = plan, labels, impl, merge or Here()
        self.weights = [term.weight for term in terms] + [0.0] * (len(plan.formulas) - len(terms))
        self.shares = [term.options.get("t", 0.0) for term in terms]

    def __call__(
        self, z: Tensor, y: Tensor | None, at: slice, factors: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels = None if self.labels is None else self.labels[at]
        compared = self._comparisons(z, y, labels)  # first: the gradient overwrites the logits
        numbers = formulas.coefficients(self.weights, self.shares, z)
        if self.impl == "triton":
            from kdlm_kernels import triton_rows

            total, values = triton_rows.rows(z, y, labels, factors, numbers, grad, self.plan, self.merge)
        else:
            total, values = self._in_blocks(z, y, labels, factors, numbers, grad)
        return total, dict(zip(self.plan.names, values, strict=True)) | compared

    def _in_blocks(self, z, y, labels, factors, numbers, grad) -> tuple[Tensor, list[Tensor]]:
        if z.device.type == "cpu":
            keep_freed_memory()
        inputs = (z, y, labels, factors)
        # Written into what was there before the temporaries: small results that outlive them would lie between them,
        # and the heap could not use their places again (230 MiB for a chunk of 256 x 151,936).
        total, values = z.new_empty(len(z)), z.new_empty(len(self.plan.formulas), len(z))
        for block in blocks(len(z), self.merge.size(z.shape[1]), z.device):
            cut = [None if x is None else x[block] for x in inputs]
            into = None if grad is None else grad[block]
            total[block], parts = formulas.rows(*cut, numbers, into, self.plan, self.merge)
            for number, part in enumerate(parts):
                values[number, block] = part
        return total, list(values)

    def _comparisons(self, z: Tensor, y: Tensor | None, labels: Tensor | None) -> dict[str, Tensor]:
        """Compare arg-maxima. What a head does after its product (scale, softcap) does not move them."""
        found = {}
        for name in self.plan.comparisons:
            if name == "accuracy":
                same = self.merge.argmax(z) == labels
            else:
                assert y is not None
                same = self.merge.argmax(z[:, : self.plan.shared]) == self.merge.argmax(y[:, : self.plan.shared])
            found[name] = same.to(z.dtype)
        return found


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed temporaries instead of handing every one back to the system.

    It hands back what exceeds twice the largest block freed so far. Temporaries of a few rows times the vocabulary
    exceed that of a young process, and are then paged in anew for every block: measured, 2.1 s instead of 0.6 s for
    the row part of forward KL at 1,024 x 151,936. Freeing one block of 16 MiB, which is never touched, moves the limit.
    """
    torch.empty(16 << 20, dtype=torch.uint8)
