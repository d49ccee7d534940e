"""The four matrix products of a token loss, in tiles, with wide accumulation.

`wide` tensors (logits, accumulators) are fp32, or float64 where the model is; `narrow` is the dtype of the factors.
Where they differ the product still accumulates and returns `wide`: CUDA does it in the product (`out_dtype`), other
devices by widening both factors one tile of the vocabulary at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CONVERTED = 8192
"""Token ids per tile where a head has to be converted; a converted copy of a whole head would cost its own size."""
_TRANSPOSED, _FEW_ROWS = 1024, 512
"""On a CPU, up to 512 rows are projected in tiles of 1,024 ids, as `head @ hidden.T`, and turned round afterwards:
the BLAS packs the longer factor anew for every call, and takes up to 1.4 times as long the plain way."""


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of the factors: the autocast dtype where autocast is on, else that of the hidden states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def wide_dtype(narrow: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and accumulators: at least fp32."""
    return torch.promote_types(narrow, torch.float32)


def gradient_dtype(narrow: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the gradient to the logits, a factor of two products: narrow where those are fast."""
    return narrow if device.type == "cuda" else wide_dtype(narrow)


def _tiles(weight: Tensor, narrow: torch.dtype, step: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the vocabulary with the head's rows as a factor: one slice where nothing is converted."""
    native = weight.dtype == narrow and (weight.is_cuda or narrow == wide_dtype(narrow))
    step = step or (weight.shape[0] if native else _CONVERTED)
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step), weight[start : start + step].to(narrow)


def _addmm(total: Tensor, a: Tensor, b: Tensor, *, beta: int) -> None:
    """`total = beta * total + a @ b` in the precision of `total`; `beta` 0 ignores what `total` holds."""
    if a.dtype == b.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def project(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`logits [rows, vocab] = hidden @ weight.T + bias`, written in place."""
    if logits.is_cuda or not 1 < len(hidden) <= _FEW_ROWS:
        for ids, tile in _tiles(weight, hidden.dtype):
            _addmm(logits[:, ids], hidden, tile.t(), beta=0)
    else:
        turned = logits.new_empty(min(_TRANSPOSED, len(weight)), len(hidden))
        for ids, tile in _tiles(weight, hidden.dtype, _TRANSPOSED):
            part = turned[: len(tile)]
            _addmm(part, tile, hidden.t(), beta=0)
            logits[:, ids].copy_(part.t())
    if bias is not None:
        logits.add_(bias)


def hidden_gradient(out: Tensor, grad: Tensor, weight: Tensor, narrow: torch.dtype) -> None:
    """`out [rows, hidden] = grad @ weight`, written in place."""
    for number, (ids, tile) in enumerate(_tiles(weight, narrow)):
        _addmm(out, grad[:, ids], tile, beta=min(number, 1))


def head_gradient(total: Tensor, grad: Tensor, hidden: Tensor, *, first: bool) -> None:
    """`total [vocab, hidden] += grad.T @ hidden`, in place; the first chunk overwrites."""
    _addmm(total, grad.t(), hidden, beta=0 if first else 1)
