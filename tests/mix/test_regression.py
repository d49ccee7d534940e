"""Predictions of mixtures from those that were judged."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from kdlm.mix.regression import fitted


def judged(count: int, noise: float = 0.0, seed: int = 0):
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(4), count)
    scores = 2 + weights @ [1.0, -0.5, 0.2, 0.0] + 0.8 * (weights[:, 0] - 0.3) ** 2 - weights[:, 1] * weights[:, 2]
    return weights, scores + noise * generator.standard_normal(count)


def test_a_quadratic_function_of_the_weights_is_found():
    fit = fitted(*judged(60))
    weights, scores = judged(200, seed=1)
    assert fit(weights) == pytest.approx(scores, abs=1e-3)
    assert fit.agreement > 0.999


def test_what_is_left_out_is_predicted_by_the_others():
    weights, scores = judged(25, noise=0.1)
    fit = fitted(weights, scores)
    rest = np.arange(25) != 7
    alone = fitted(weights[rest], scores[rest])
    if alone.penalty == fit.penalty:
        # the centre of the features moves a little with the row that is left out
        assert fit.left_out[7] == pytest.approx(alone(weights[7:8])[0], abs=0.05)
    assert np.square(scores - fit.left_out).sum() > np.square(scores - fit(weights)).sum()


def test_noise_is_answered_by_a_larger_penalty_and_still_ranks():
    fits = [fitted(*judged(40, noise=noise)) for noise in (0.0, 0.5)]
    assert fits[0].penalty < fits[1].penalty
    weights, scores = judged(200, seed=1)
    assert spearmanr(fits[1](weights), scores).statistic > 0.5


def test_scores_that_are_all_alike_agree_with_nothing():
    weights, _ = judged(10)
    fit = fitted(weights, np.ones(10))
    assert np.isnan(fit.agreement) and fit(weights) == pytest.approx(np.ones(10))
