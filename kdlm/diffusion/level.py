"""Level: how much of a sample and how much noise `x_t = alpha x_0 + sigma e` holds; the one internal form.

Every family of diffusion models walks its own path through the same quarter of a plane: variance preserving
(alpha^2 + sigma^2 = 1), variance exploding (alpha = 1), flow matching (alpha + sigma = 1), TrigFlow. Points on one ray
from the origin differ by a factor on x_t only, so a denoiser trained on one path can be asked at a level of any other.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """One noise level for each sample of a batch.

    Attributes:
        alpha: factor of the clean sample, >= 0.
        sigma: standard deviation of the noise, >= 0; not both are 0.
    """

    alpha: Float[Tensor, "batch"]
    sigma: Float[Tensor, "batch"]

    @property
    def ratio(self) -> Float[Tensor, "batch"]:
        """Noise to signal, sigma / alpha: EDM's sigma. Infinite where nothing of the sample is left."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Float[Tensor, "batch"]:
        """Signal to noise, alpha^2 / sigma^2; sigma must not be 0."""
        return (self.alpha / self.sigma).square()

    @property
    def angle(self) -> Float[Tensor, "batch"]:
        """Direction of the ray, 0 (clean) to pi / 2 (noise): finite everywhere, unlike the ratio."""
        return torch.atan2(self.sigma, self.alpha)

    @property
    def scale(self) -> Float[Tensor, "batch"]:
        """Distance from the origin: what `x_t` is divided by to lie on the variance-preserving path."""
        return torch.hypot(self.alpha, self.sigma)

    def __getitem__(self, index: Tensor | slice) -> "Level":
        return Level(self.alpha[index], self.sigma[index])

    def noised(self, clean: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"]) -> Tensor:
        """Return `alpha x_0 + sigma e`."""
        return over(self.alpha, clean) * clean + over(self.sigma, clean) * noise

    def noise_in(self, noised: Float[Tensor, "batch *shape"], clean: Float[Tensor, "batch *shape"]) -> Tensor:
        """Return the noise e that leads from the clean sample to the noised one; sigma must not be 0."""
        return (noised - over(self.alpha, clean) * clean) / over(self.sigma, clean)

    def clean_in(self, noised: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"]) -> Tensor:
        """Return the clean sample that noise e leads away from; alpha must not be 0."""
        return (noised - over(self.sigma, noised) * noise) / over(self.alpha, noised)

    def like(self, other: Tensor) -> "Level":
        """Return the level on the device of another tensor."""
        return Level(self.alpha.to(other.device), self.sigma.to(other.device))


def over(values: Shaped[Tensor, "batch"], samples: Float[Tensor, "batch *shape"]) -> Tensor:
    """Return one value per sample, shaped to be multiplied with samples."""
    return values.reshape(-1, *([1] * (samples.dim() - 1)))


def moved(
    noised: Float[Tensor, "batch *shape"], clean: Float[Tensor, "batch *shape"], at: Level, to: Level
) -> Float[Tensor, "batch *shape"]:
    """Return `x_t` carried from one level to another with its own noise kept: one DDIM step (arXiv 2010.02502).

    `clean` is the prediction of x_0 at the level `at`, whose sigma must not be 0.
    """
    return to.noised(clean, at.noise_in(noised, clean))
