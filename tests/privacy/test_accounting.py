"""What epsilon is said to be: Opacus's figure, and the ones that theory gives for settings it knows."""

from math import exp, lgamma, log, sqrt

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from kdlm.privacy import PrivacySection
from kdlm.privacy.optimizer import epsilon_of, noise_for

MNIST = {"rate": 250 / 60_000, "noise": 1.3, "steps": 3600, "delta": 1e-5}
"""Batches of 250 of 60,000 images, 15 passes: the setting of TensorFlow Privacy's tutorial."""


def spent(kind: type = RDPAccountant, *, rate: float, noise: float, steps: int, delta: float) -> float:
    accountant = kind()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return epsilon_of(accountant, delta)


def renyi(order: int, rate: float, noise: float) -> float:
    """Renyi divergence of the subsampled Gaussian at a whole order (Mironov et al. 2019, arXiv 1908.10530, eq. 30)."""
    terms = [
        lgamma(order + 1) - lgamma(k + 1) - lgamma(order - k + 1)
        + (order - k) * log(1 - rate) + k * log(rate) + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    return float(logsumexp(terms)) / (order - 1)


def test_a_published_setting_gives_the_published_epsilon() -> None:
    """The tutorial says 1.18, by the first conversion of Renyi divergences; Opacus converts more tightly."""
    rate, noise, steps, delta = MNIST.values()
    orders = range(2, 64)
    first = min(steps * renyi(a, rate, noise) + log(1 / delta) / (a - 1) for a in orders)
    assert round(first, 2) == 1.18
    tight = min(
        steps * renyi(a, rate, noise) + log((a - 1) / a) - (log(delta) + log(a)) / (a - 1) for a in orders
    )  # Canonne et al. 2020, arXiv 2004.00010, proposition 12
    ours = spent(**MNIST)
    assert ours <= tight + 1e-9  # it has orders between the whole ones too
    assert ours == pytest.approx(tight, abs=2e-3)


def test_it_is_what_opacus_says() -> None:
    accountant = RDPAccountant()
    accountant.history = [(MNIST["noise"], MNIST["rate"], MNIST["steps"])]
    assert spent(**MNIST) == accountant.get_epsilon(1e-5)


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    """Renyi divergence T a / (2 s^2): no subsampling, nothing of Opacus's in it."""
    noise, steps, delta = 8.0, 20, 1e-5
    orders = RDPAccountant.DEFAULT_ALPHAS
    wanted = min(steps * a / (2 * noise**2) + log((a - 1) / a) - (log(delta) + log(a)) / (a - 1) for a in orders)
    assert spent(rate=1.0, noise=noise, steps=steps, delta=delta) == pytest.approx(wanted, rel=1e-9)


def test_renyi_orders_promise_no_more_than_the_exact_curve_of_the_gaussian_mechanism() -> None:
    noise, steps, delta = 8.0, 20, 1e-5
    mean = sqrt(steps) / noise

    def missing(epsilon: float) -> float:  # Balle and Wang 2018, arXiv 1805.06530, theorem 8
        left, right = -epsilon / mean + mean / 2, -epsilon / mean - mean / 2
        return norm.cdf(left) - exp(epsilon) * norm.cdf(right) - delta

    exact = brentq(missing, 0.0, 50.0)
    assert exact <= spent(rate=1.0, noise=noise, steps=steps, delta=delta) <= 1.15 * exact


def test_the_other_accountant_promises_less_epsilon_for_the_same_steps() -> None:
    prv = spent(PRVAccountant, **MNIST)
    assert 0.5 * spent(**MNIST) < prv < spent(**MNIST)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_noise_for_an_epsilon_keeps_it_and_little_more(accountant: str) -> None:
    section = PrivacySection(epsilon=2.0, delta=1e-5, accountant=accountant)
    noise = noise_for(section, 0.01, 200)
    kind = RDPAccountant if accountant == "rdp" else PRVAccountant
    assert 1.95 < spent(kind, rate=0.01, noise=noise, steps=200, delta=1e-5) <= 2.0


def test_before_the_first_step_nothing_is_spent() -> None:
    assert epsilon_of(RDPAccountant(), 1e-5) == 0


def test_an_epsilon_that_no_noise_reaches_is_refused_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"privacy\.epsilon: no noise keeps 1000 steps below 1e-09"):
        noise_for(PrivacySection(epsilon=1e-9, delta=1e-9), 1.0, 1000)


@pytest.mark.parametrize("said", [{}, {"noise": 1.0, "epsilon": 2.0}])
def test_noise_and_epsilon_are_one_choice(said: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="either noise, or the epsilon"):
        PrivacySection(**said)
