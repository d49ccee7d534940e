"""Regression: ridge on weights, their squares and products, whose penalty leave-one-out errors choose."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from kdlm.mix.candidates import Weights

PENALTIES = tuple(10.0**power for power in range(-6, 2))


@dataclass(frozen=True)
class Fitted:
    """A quadratic function of a mixture's weights.

    Attributes:
        left_out: what each judged mixture was predicted as by the fit to all others.
        agreement: Spearman correlation of these with the judgements; nan where one of the two is constant.
    """

    coefficients: Float[np.ndarray, "features"]
    mean: Float[np.ndarray, "features"]
    level: float
    penalty: float
    left_out: Float[np.ndarray, "judged"]
    agreement: float

    def __call__(self, weights: Weights) -> Float[np.ndarray, "mixtures"]:
        """Return what mixtures are predicted to score."""
        return self.level + (basis(weights) - self.mean) @ self.coefficients


def basis(weights: Weights) -> Float[np.ndarray, "mixtures features"]:
    """Return the weights, their squares and the products of two."""
    first, second = np.triu_indices(weights.shape[1])
    return np.concatenate([weights, weights[:, first] * weights[:, second]], axis=1)


def fitted(weights: Weights, scores: Float[np.ndarray, "mixtures"]) -> Fitted:
    """Fit the scores of judged mixtures; the penalty is that with the least leave-one-out error."""
    features, level = basis(weights), scores.mean()
    mean = features.mean(0)
    u, s, v = np.linalg.svd(features - mean, full_matrices=False)
    target, best = u.T @ (scores - level), None
    for penalty in PENALTIES:
        shrink = s**2 / (s**2 + penalty)
        leverage = np.square(u) @ shrink + 1 / len(scores)  # the level is fitted too
        error = (scores - level - u @ (shrink * target)) / np.maximum(1 - leverage, 1e-9)
        if best is None or np.square(error).sum() < np.square(best[1]).sum():
            best = penalty, error
    assert best is not None
    penalty, error = best
    coefficients = v.T @ (s / (s**2 + penalty) * target)
    left_out = scores - error
    constant = np.ptp(scores) == 0 or np.ptp(left_out) == 0
    agreement = float("nan") if constant else float(spearmanr(left_out, scores).statistic)
    return Fitted(coefficients, mean, float(level), penalty, left_out, agreement)
