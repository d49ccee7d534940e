"""Gradients of the pulls against closed forms: samples are good under the wrong gradient too, so these are what counts.

A student in one dimension, x = mu + S z, whose law and posterior mean are known at every noise level; means are taken
by quadrature over z and the noise, in float64, and are exact.
"""

import math

import pytest
import torch
from matching import posterior
from torch import Tensor

from kdlm.diffusion import Level
from kdlm.methods.diffusion.density_ratio import WEIGHTS
from kdlm.methods.diffusion.pull import Compared, NormalisedDifference, along, teacher_error
from kdlm.methods.diffusion.reverse_kl import NoiseDifference, PointDifference
from kdlm.methods.diffusion.score_implicit import ScoreIdentity, ScoreImplicit, score_identity

SIGMA, MEAN, STD = 0.8, 0.4, 1.1
"""The noise level, and the teacher's law."""


def grid(count: int = 161, reach: float = 8.0) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes (z, e) and weights of a two-dimensional standard normal law: the trapezoid rule is exact to rounding."""
    nodes = torch.linspace(-reach, reach, count, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2) / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])
    z, e = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), e.reshape(-1, 1), (weights[:, None] * weights).flatten()


def theta() -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.9))


def seen(mu: Tensor, spread: Tensor, *, alpha: float = 1.0) -> tuple[Compared, Tensor]:
    """The student's samples, and what a frozen teacher and a frozen, perfect fake network say of them."""
    z, e, weights = grid()
    x = mu + spread * z
    level = Level(*(torch.full((len(z),), value, dtype=torch.float64) for value in (alpha, alpha * SIGMA)))
    clean_and_noise = x + SIGMA * e
    real = posterior(clean_and_noise, MEAN, STD, SIGMA)
    fake = posterior(clean_and_noise, mu.detach(), spread.detach(), SIGMA)
    return Compared(x, level, alpha * clean_and_noise, real, fake), weights


def grads(value: Tensor, of: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack(torch.autograd.grad(value, of))


def squared_gap(mu: Tensor, spread: Tensor, *, law_held: bool) -> Tensor:
    """E |y_teacher - y_fake|^2, the fake prediction a function of theta, the law that is averaged over too or not."""
    z, e, weights = grid()
    noised = mu + spread * z + SIGMA * e
    noised = noised.detach() if law_held else noised
    gap = posterior(noised, MEAN, STD, SIGMA) - posterior(noised, mu, spread, SIGMA)
    return (weights * gap.square().flatten()).sum()


@pytest.mark.parametrize(("alpha", "law_held"), [(1.0, True), (0.5, False)])
def test_the_score_identity_has_half_the_gradient_of_the_squared_gap(alpha: float, law_held: bool) -> None:
    of = theta()
    look, weights = seen(*of)
    ours = grads((weights * score_identity(look.samples, look.real, look.fake, alpha)).sum(), of)
    torch.testing.assert_close(ours, grads(squared_gap(*of, law_held=law_held), of) / 2, rtol=1e-9, atol=1e-12)


def test_alpha_takes_off_the_part_through_the_law_in_proportion() -> None:
    of = theta()
    look, weights = seen(*of)

    def at(alpha: float) -> Tensor:
        value = (weights * score_identity(look.samples, look.real, look.fake, alpha)).sum()
        return torch.stack(torch.autograd.grad(value, of, retain_graph=True))

    through = grads(squared_gap(*of, law_held=False) - squared_gap(*of, law_held=True), of)
    torch.testing.assert_close(at(0.5) - at(1.2), 0.7 * through, rtol=1e-9, atol=1e-12)


def test_score_implicit_matching_has_the_gradient_of_its_distance_with_the_law_held() -> None:
    of, huber = theta(), 0.3
    look, weights = seen(*of)
    ours = grads((weights * ScoreImplicit("pseudo_huber", huber)(look)).sum(), of)
    z, e, _ = grid()
    noised = (of[0] + of[1] * z + SIGMA * e).detach()
    gap = posterior(noised, MEAN, STD, SIGMA) - posterior(noised, *of, SIGMA)
    distance = (gap.square() + huber**2).sqrt() - huber
    torch.testing.assert_close(ours, grads((weights * distance.flatten()).sum(), of), rtol=1e-8, atol=1e-12)


def test_the_squared_distance_of_sim_is_sid_with_alpha_one() -> None:
    look, _ = seen(*theta())
    assert torch.equal(ScoreImplicit("squared")(look), ScoreIdentity(1.0)(look))


@pytest.mark.parametrize("detached", ["gap", "everything but x"])
def test_detaching_inputs_is_another_gradient(detached: str) -> None:
    of = theta()
    look, weights = seen(*of)
    if detached == "gap":
        gap = (look.real - look.fake).detach()
        value = (gap * (look.fake - look.samples)).mean(1)
    else:
        value = score_identity(look.samples, look.real.detach(), look.fake.detach(), 1.0)
    wrong, right = grads((weights * value).sum(), of), grads(squared_gap(*of, law_held=True), of) / 2
    assert (wrong - right).norm() > 0.2 * right.norm()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_with_all_but_x_detached_is_dmd(alpha: float) -> None:
    look, _ = seen(*theta())
    x = look.samples.detach().requires_grad_()
    still = Compared(x, look.level, look.noised.detach(), look.real.detach(), look.fake.detach())
    ours = torch.autograd.grad(ScoreIdentity(alpha)(still).sum(), x)[0]
    dmd = torch.autograd.grad(NormalisedDifference()(still).sum(), x)[0]
    torch.testing.assert_close(ours, dmd, rtol=1e-12, atol=1e-14)


def kl(mu: Tensor, spread: Tensor) -> Tensor:
    """KL of the student's noised law from the teacher's."""
    ours, theirs = spread.square() + SIGMA**2, STD**2 + SIGMA**2
    return 0.5 * (torch.log(theirs / ours) + (ours + (mu - MEAN).square()) / theirs - 1)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("weight", ["constant", "variance"])
def test_the_difference_of_noises_has_the_gradient_of_the_reverse_kl(weight: str, alpha: float) -> None:
    of = theta()
    look, weights = seen(*of, alpha=alpha)
    ours = grads((weights * NoiseDifference(weight)(look)).sum(), of)
    factor = SIGMA if weight == "constant" else SIGMA**3 / (1 + SIGMA**2)
    torch.testing.assert_close(ours, factor * grads(kl(*of), of), rtol=1e-9, atol=1e-12)


def test_dmd_is_the_difference_over_the_teachers_error() -> None:
    look, _ = seen(*theta())
    x = look.samples.detach().requires_grad_()
    ours = torch.autograd.grad(NormalisedDifference()(Compared(x, *fixed(look))).sum(), x)[0]
    difference = (look.fake - look.real).detach()
    error = (x - look.real).abs().mean(1, keepdim=True).clamp(min=1e-8)
    torch.testing.assert_close(ours, (difference / error).detach())
    assert teacher_error(look).shape == (len(x),)


def fixed(look: Compared) -> tuple:
    return look.level, look.noised.detach(), look.real.detach(), look.fake.detach()


def test_a_point_has_the_score_of_the_noise_that_was_added() -> None:
    look, _ = seen(*theta())
    x = look.samples.detach().requires_grad_()
    level, noised, real, _ = fixed(look)
    ours = torch.autograd.grad(PointDifference()(Compared(x, level, noised, real, x)).sum(), x)[0]
    noise = grid()[1]
    torch.testing.assert_close(ours, level.noise_in(noised, real) - noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pull", [NormalisedDifference(), NoiseDifference(), ScoreIdentity(), ScoreImplicit()])
def test_equal_predictions_pull_nowhere(pull) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    level = Level(torch.ones(4), torch.ones(4))
    noised = x + torch.randn_like(x)
    same = noised * 0.4
    value = pull(Compared(x, level, noised, same, same))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))


FUNCTIONS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (1 + r) * ((1 + r) / r).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "neyman": lambda r: (1 - r).square() / r,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_weighed_pull_has_the_gradient_of_the_f_divergence(name: str) -> None:
    of = theta()
    mu, spread = of
    look, weights = seen(mu, spread)

    def log_density(at: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
        return -0.5 * ((at - mean) ** 2 / variance + torch.as_tensor(variance).log() + math.log(2 * math.pi))

    ours, theirs = spread.square() + SIGMA**2, STD**2 + SIGMA**2
    at = look.noised.detach()
    ratio = (log_density(at, MEAN, theirs) - log_density(at, mu, ours)).exp().detach()
    score_gap = (look.fake - look.real).detach() / SIGMA**2
    pulled = grads((weights * WEIGHTS[name](ratio).flatten() * along(look.samples, score_gap)).sum(), of)
    line = torch.linspace(-14, 14, 4001, dtype=torch.float64)
    q = log_density(line, mu, ours)
    divergence = torch.trapezoid(q.exp() * FUNCTIONS[name]((log_density(line, MEAN, theirs) - q).exp()), line)
    torch.testing.assert_close(pulled, grads(divergence, of), rtol=1e-5, atol=1e-8)
