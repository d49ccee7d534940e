"""TAID's interpolated target. The schedule of its `t` belongs to the method."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.losses.distributions import LARGE, widen
from kdlm.losses.kl import forward_kl
from kdlm.losses.truncated import on_bucket
from kdlm.signal import Dense, Hidden, Mixture, TopK


def taid_kl(
    student: Float[Tensor, "*rows vocab"],
    teacher: Float[Tensor, "*rows vocab"],
    *,
    t: float | Float[Tensor, ""],
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Float[Tensor, "*rows"]:
    """Return `T^2 KL(p_t || q)`, `p_t = softmax((1 - t) sg[z_s] + t z_t)` (TAID, ICLR 2025, arXiv 2501.16937).

    `t` moves from the student (0: value and gradient are 0) to the teacher (1: forward KL). The gradient is
    `T (q - p_t)`, as in the released code, whose value has the entropy of `p_t` in it; here it is a true KL.
    """
    if isinstance(t, float | int) and not 0 <= t <= 1:  # looking into a tensor would wait for the device
        raise ValueError(f"t must lie in [0, 1], got {t}")
    # t may be 0, and 0 times -inf is no number.
    own, other = (widen(x.detach()).clamp(min=-LARGE) for x in (student, teacher))
    other = other.to(own.dtype)
    share = t.to(own) if isinstance(t, Tensor) else t
    target = torch.lerp(own, other, share) if own.shape == other.shape else other
    return forward_kl(student, target, temperature=temperature, t_squared=t_squared)


@dataclass(frozen=True)
class TowardsTeacher:
    """TAID's loss at one moment of its schedule, as a term of `weighted_sum`."""

    signals: ClassVar[frozenset[type]] = frozenset({Dense, Hidden, Mixture, TopK})
    needs_teacher: ClassVar[bool] = True

    t: Tensor

    def __call__(
        self, student: Float[Tensor, "rows vocab"], teacher: Tensor | TopK, labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "rows"]:
        if isinstance(teacher, TopK):
            return on_bucket(taid_kl, student, teacher, t=self.t)
        return taid_kl(student, teacher, t=self.t)
