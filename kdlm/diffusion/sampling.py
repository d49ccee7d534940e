"""Sampling: the ODE of a denoiser in many steps, and a distilled student in a few."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kdlm.diffusion.boundary import Boundary
from kdlm.diffusion.denoiser import Condition, guided
from kdlm.diffusion.draws import Draws
from kdlm.diffusion.level import Level, moved, over

Step = Callable[[Tensor, Level], Tensor]
"""`(x_t, level) -> x_0`: a denoiser with its condition and guidance put in."""


def levels_of(denoiser: Any, times: Sequence[float], batch: int, like: Tensor) -> list[Level]:
    """Return the levels at times of the denoiser's own form, for a batch on the device of `like`."""
    return [denoiser.form.level(torch.full((batch,), float(time), device=like.device)) for time in times]


def follow(
    predict: Step, noised: Float[Tensor, "batch *shape"], levels: Sequence[Level], *, second_order: bool = True
) -> Float[Tensor, "batch *shape"]:
    """Follow the probability flow from `x_t` at `levels[0]` through the others to a clean sample.

    Euler steps in the ratio of noise to signal, which are DDIM steps; with `second_order` Heun's, twice the
    evaluations (arXiv 2206.00364, algorithm 1). The step to the clean sample, after the last level, is Euler's.
    """
    for at, to in pairwise(levels):
        noised = stepped(predict, noised, at, to, second_order=second_order)
    return predict(noised, levels[-1])


def stepped(
    predict: Step, noised: Float[Tensor, "batch *shape"], at: Level, to: Level, *, second_order: bool = True
) -> Float[Tensor, "batch *shape"]:
    """Take one step of the probability flow from `x_t` at one level to another; see `follow`.

    From pure noise, whose ratio of noise to signal is infinite, a step is Euler's.
    """
    clean = predict(noised, at)
    there = moved(noised, clean, at, to)
    partial = at.alpha > 0
    if not second_order or not bool(partial.any()):
        return there
    # dy/dr = (y - x_0) / r with y = x_t / alpha and r = sigma / alpha: the mean of both ends' slopes.
    finite = Level(torch.where(partial, at.alpha, 1), at.sigma)
    slope = at.noise_in(noised, clean) + to.noise_in(there, predict(there, to))
    y = noised / over(finite.alpha, noised) + over((to.ratio - finite.ratio) / 2, noised) * slope
    return torch.where(over(partial, noised), y * over(to.alpha, noised), there)


def generate(
    predict: Step,
    noise: Callable[[int], Float[Tensor, "batch *shape"]],
    levels: Sequence[Level],
    *,
    live: int | None = None,
) -> Float[Tensor, "batch *shape"]:
    """Let a few-step student write samples: predict x_0, add fresh noise of the next level, predict again.

    Args:
        noise: number of a step -> standard normal noise for it.
        levels: falling; one for each step.
        live: the step that is in the graph, whose output is returned (backward simulation of DMD2, arXiv 2405.14867);
            None runs all steps, and gradients as they are.
    """
    clean = torch.zeros_like(noise(0))
    last = len(levels) - 1 if live is None else live
    for number, level in enumerate(levels[: last + 1]):
        noised = level.noised(clean, noise(number)) if number else over(level.scale, clean) * noise(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and live in (None, number)):
            clean = predict(noised, level)
    return clean


@dataclass(frozen=True)
class FewSteps:
    """How a distilled student samples: at a few times of its own form, falling.

    Attributes:
        times: see above.
        guidance: the scale w that a denoiser which takes one is asked with; of no meaning to others.
        boundary: of the consistency function, for a student that was trained with one.
    """

    times: tuple[float, ...]
    guidance: float | None = None
    boundary: Boundary | None = None

    def __call__(
        self, denoiser: Any, draws: Draws, condition: Condition | None, *, live: int | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """Return a sample for each of `draws`; see `generate` for `live`."""
        levels = levels_of(denoiser, self.times, len(draws.index), draws.index)
        told = {}
        if self.guidance is not None and denoiser.takes_guidance:
            told["guidance"] = torch.full((len(draws.index),), self.guidance, device=draws.index.device)

        def predict(noised: Tensor, level: Level) -> Tensor:
            clean = denoiser(noised, level, condition, **told)
            return clean if self.boundary is None else self.boundary(denoiser, noised, level, clean)

        return generate(predict, lambda k: draws.normal(f"written {k}", denoiser.shape), levels, live=live)


@dataclass(frozen=True)
class ODE:
    """How a teacher samples: along its probability flow, in many steps.

    Attributes:
        times: of its own form, falling.
        guidance: w of classifier-free guidance.
        second_order: Heun's steps, else Euler's.
    """

    times: tuple[float, ...]
    guidance: float = 0.0
    second_order: bool = True

    @torch.no_grad()
    def __call__(self, denoiser: Any, draws: Draws, condition: Condition | None) -> Float[Tensor, "batch *shape"]:
        """Return a sample for each of `draws`, from the noise that `FewSteps` begins with."""
        levels = levels_of(denoiser, self.times, len(draws.index), draws.index)
        noise = draws.normal("written 0", denoiser.shape)
        predict = partial(guided, denoiser, condition=condition, scale=self.guidance)
        return follow(predict, over(levels[0].scale, noise) * noise, levels, second_order=self.second_order)
