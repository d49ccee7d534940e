"""The four matrix products of a token loss, in tiles, with wide accumulation.

`wide` tensors (logits, their gradient, accumulators) are fp32, or float64 where the model is. `narrow` is the dtype of
the product's inputs. Where they differ the product still accumulates and returns `wide`: CUDA does it in the product
(`out_dtype`), other devices by widening both factors one tile of the vocabulary at a time.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_TILE = 8192
"""Token ids per tile where a head has to be converted; a converted copy of a whole head would cost its own size."""


def product_dtype(hidden: Float[Tensor, "rows hidden"]) -> torch.dtype:
    """Return the dtype of the factors: the autocast dtype where autocast is on, else that of the hidden states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def wide_dtype(narrow: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and accumulators: at least fp32."""
    return torch.promote_types(narrow, torch.float32)


def _tiles(weight: Float[Tensor, "vocab hidden"], narrow: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the vocabulary with the head's rows as a factor: one slice where nothing is converted."""
    native = weight.dtype == narrow and (weight.is_cuda or narrow == wide_dtype(narrow))
    step = weight.shape[0] if native else _TILE
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


def project(
    logits: Float[Tensor, "rows vocab"],
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, "vocab"] | None,
) -> None:
    """`logits = hidden @ weight.T + bias`, written in place."""
    for ids, tile in _tiles(weight, hidden.dtype):
        _addmm(logits[:, ids], hidden, tile.t(), beta=0)
    if bias is not None:
        logits.add_(bias)


def hidden_gradient(
    out: Float[Tensor, "rows hidden"],
    grad: Float[Tensor, "rows vocab"],
    weight: Float[Tensor, "vocab hidden"],
    narrow: torch.dtype,
) -> None:
    """`out = grad @ weight`, written in place."""
    for number, (ids, tile) in enumerate(_tiles(weight, narrow)):
        _addmm(out, grad[:, ids].to(narrow) if out.is_cuda else grad[:, ids], tile, beta=min(number, 1))


def head_gradient(
    total: Float[Tensor, "vocab hidden"],
    grad: Float[Tensor, "rows vocab"],
    hidden: Float[Tensor, "rows hidden"],
    *,
    first: bool,
) -> None:
    """`total += grad.T @ hidden`, in place; the first chunk overwrites."""
    factor = grad.to(hidden.dtype) if total.is_cuda else grad
    _addmm(total, factor.t(), hidden, beta=0 if first else 1)
