"""How fast a denoiser's answer changes along a path: what continuous-time consistency models are trained with."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdlm.diffusion.level import over

Differentiation = Literal["forward", "difference"]
"""Forward mode, or a central difference where a network has an operation without a forward derivative."""
Path = Callable[[Tensor, Tensor], Tensor]
"""`(x_t, time) -> x_0`: a denoiser at the levels of some form."""
STEP = 1e-3


def derivative(
    predict: Path,
    noised: Float[Tensor, "batch *shape"],
    time: Float[Tensor, "batch"],
    velocity: Float[Tensor, "batch *shape"],
    *,
    factor: Float[Tensor, "batch"],
    how: Differentiation = "forward",
) -> Float[Tensor, "batch *shape"]:
    """Return `factor * d/dt predict(x_t, t)` along `dx/dt = velocity`, without a graph.

    The factor goes into the tangents, where it keeps them small, and not onto what comes out (arXiv 2410.11081,
    section 4.1). Nothing runs in reduced precision: a derivative is a difference.

    Args:
        time: in float32 at least, and not 0; rows are independent of each other.
        how: `forward` is torch.func.jvp, with the attention kernel that has a forward derivative; `difference` steps
            by a thousandth of the time to both sides, for two evaluations and an error of that order squared.

    Raises ValueError for a time in less than float32, whose steps a network's time embedding would show.
    """
    if torch.finfo(time.dtype).bits < 32:
        raise ValueError(f"a derivative in time needs the time in float32 or float64, not {time.dtype}")
    noised = noised.detach().to(torch.promote_types(noised.dtype, time.dtype))
    tangents = (over(factor, noised) * velocity).to(noised.dtype), factor.to(time.dtype)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(noised.device.type, enabled=False):
        if how == "forward":
            return torch.func.jvp(predict, (noised, time), tangents)[1]
        return _difference(predict, noised, time, tangents)


def _difference(predict: Path, noised: Tensor, time: Tensor, tangents: tuple[Tensor, Tensor]) -> Tensor:
    # Both sides draw the same dropout masks. Along the factor's tangent time moves by step * factor = STEP |t|.
    step = STEP * time.abs() / tangents[1].abs().clamp(min=torch.finfo(time.dtype).tiny)
    by = over(step, noised) * tangents[0]
    with rewound(noised):
        before = predict(noised - by, time - step * tangents[1])
    after = predict(noised + by, time + step * tangents[1])
    return (after - before) / over(2 * step, noised)


def rewound(like: Tensor) -> AbstractContextManager[None]:
    """Put the random generators back after the block: what follows draws the same dropout masks again."""
    return torch.random.fork_rng(devices=[like.device] if like.is_cuda else [])
