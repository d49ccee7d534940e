"""UnitByUnit: Opacus's DP optimiser, fed with the gradient of one unit at a time. Needs Opacus.

Opacus's own per-sample gradients come from hooks on the layers it knows; here each unit has a backward pass of its own,
which is exact for any architecture, tied heads, fused losses and adapters. Clipping, noise, scaling and the accountant
are Opacus's (`opacus.optimizers.DPOptimizer`, Yousefpour et al. 2021, arXiv 2109.12298; DP-SGD is Abadi et al. 2016,
arXiv 1607.00133, algorithm 1).
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import Tensor

from kdlm.privacy.section import PrivacySection


class UnitByUnit(DPOptimizer):
    """Sums clipped gradients of units, and moves the weights by the noisy sum over the expected number of units.

    Args:
        optimizer: what moves the weights; it sees the noisy gradient alone.
        section: clip, noise and accountant.
        noise: the noise multiplier.
        expected: mean number of units in a step.
        rate: probability of a unit to be in a step.
        seed: number of steps done -> seed of the next one's noise.
        device: of the weights.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        section: PrivacySection,
        *,
        noise: float,
        expected: int,
        rate: float,
        seed: Callable[[int], int],
        device: torch.device,
    ):
        super().__init__(
            optimizer,
            noise_multiplier=noise,
            max_grad_norm=section.clip,
            expected_batch_size=expected,
            generator=torch.Generator(device),
        )
        self.expected, self.seed, self.delta = expected, seed, section.delta
        self.accountant: Any = create_accountant(section.accountant)
        self.attach_step_hook(self.accountant.get_optimizer_hook_fn(rate))
        self._none()

    @property
    def done(self) -> int:
        """Steps that are accounted for."""
        return sum(steps for _, _, steps in self.accountant.history)

    @property
    def epsilon(self) -> float:
        """Epsilon, at the section's delta, of the steps done; infinite without noise."""
        if not self.noise_multiplier:
            return float("inf")
        return epsilon_of(self.accountant, self.delta)

    def take_unit(self) -> Tensor:
        """Clip the gradient that stands in the weights' `grad`, add it to the step's sum; return its norm before."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.params]
        norm = torch.nn.utils.get_total_norm(grads)
        for parameter, grad in zip(self.params, grads, strict=True):
            parameter.grad_sample = grad.masked_fill(~norm.isfinite(), 0)[None]  # it cannot be scaled down
            parameter.grad = None
        self.signal_skip_step()
        super().step()
        self.zero_grad(set_to_none=True)
        self._none()
        return norm

    def add_noise(self) -> None:
        assert self.generator is not None
        self.generator.manual_seed(self.seed(self.done))
        super().add_noise()

    def step(self, closure: Any = None) -> Any:
        outcome = super().step(closure)
        self.zero_grad(set_to_none=True)
        self._none()
        return outcome

    def sum_norm(self) -> Tensor:
        """Return the norm of the step's sum of clipped gradients, over the expected number of units."""
        sums = [p.summed_grad for p in self.params if p.summed_grad is not None]
        return torch.nn.utils.get_total_norm(sums) / self.expected

    def _none(self) -> None:
        """Stand ready for a step without any further unit."""
        for parameter in self.params:
            parameter.grad_sample = parameter.new_empty((0, *parameter.shape))


def epsilon_of(accountant: Any, delta: float) -> float:
    """Return an accountant's epsilon, 0 before the first step."""
    if not accountant.history:
        return 0.0
    with warnings.catch_warnings():
        # A larger range of orders might give a smaller epsilon: this one holds too.
        warnings.filterwarnings("ignore", "Optimal order is the")
        return float(accountant.get_epsilon(delta))


def noise_for(section: PrivacySection, rate: float, steps: int) -> float:
    """Return the section's noise multiplier, or the least that keeps so many steps below its epsilon.

    Raises ValueError where none does.
    """
    if section.noise is not None:
        return section.noise
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order is the")
            return get_noise_multiplier(
                target_epsilon=section.epsilon or 0.0,
                target_delta=section.delta,
                sample_rate=rate,
                steps=steps,
                accountant=section.accountant,
                epsilon_tolerance=min(0.01, (section.epsilon or 0.0) / 100),
            )
    except ValueError as error:
        raise ValueError(f"privacy.epsilon: no noise keeps {steps} steps below {section.epsilon}: {error}") from error
