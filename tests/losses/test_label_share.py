"""Labels again in every generation ("Even Your Teacher Needs Guidance"): what theory says of kernel ridge, exactly."""

from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

from kdlm.losses import label_share, progressive_cross_entropy

PENALTY = 0.3


def kernel(a, b):
    return (-(a[:, None] - b[None]).square() / 0.01).exp()


@pytest.fixture
def world():
    """Noisy values of a sine at 30 points, the true ones at 40 others, and both kernels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, generator=generator).double()
    held_out = torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    noise = 0.5 * torch.randn(30, generator=generator).double()
    return kernel(x, x), (2 * torch.pi * x).sin() + noise, kernel(held_out, x), (2 * torch.pi * held_out).sin()


def fitted(gram, targets, penalty=PENALTY):
    """Return the coefficients of kernel ridge; what they say of the training points is `gram @` them."""
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram)).double(), targets)


def generations(gram, labels, share, count):
    """Return the coefficients of each generation, the first of which has the labels alone."""
    line = [fitted(gram, labels)]
    for _ in range(count - 1):
        line.append(fitted(gram, share * labels + (1 - share) * gram @ line[-1]))
    return line


@pytest.mark.parametrize("share", [1.0, 0.6, 0.25])
def test_any_share_of_labels_ends_at_ridge_with_the_penalty_over_the_share(world, share):
    gram, labels, _, _ = world
    last = generations(gram, labels, share, 200)[-1]
    torch.testing.assert_close(gram @ last, gram @ fitted(gram, labels, PENALTY / share), rtol=0, atol=1e-8)


def test_without_labels_every_generation_shrinks_towards_nothing(world):
    gram, labels, _, _ = world
    line = [(gram @ each).norm() for each in generations(gram, labels, 0.0, 300)]
    assert all(after < before for before, after in pairwise(line))
    # The strongest direction decays slowest, by k / (k + penalty) in each generation.
    slowest = torch.linalg.eigvalsh(gram)[-1]
    long = (slowest / (slowest + PENALTY)) ** 3000
    assert (gram @ generations(gram, labels, 0.0, 3000)[-1]).norm() <= 1.01 * long * line[0] + 1e-12


def test_the_estimated_share_has_the_least_error_on_held_out_rows(world):
    gram, labels, across, truth = world
    before = generations(gram, labels, 0.3, 2)[-1]
    unguided, guided = (across @ fitted(gram, targets) for targets in (gram @ before, labels))
    best = label_share(truth, unguided, guided)
    grid = torch.linspace(0, 1, 1001).double()
    errors = [
        (across @ fitted(gram, share * labels + (1 - share) * gram @ before) - truth).square().sum() for share in grid
    ]
    assert (best - grid[torch.stack(errors).argmin()]).abs() <= 0.5e-3 + 1e-9
    at_best = (across @ fitted(gram, best * labels + (1 - best) * gram @ before) - truth).square().sum()
    assert at_best <= min(errors)
    assert 0 < best < 1


def test_the_estimated_share_stays_between_none_and_all():
    unguided, guided = torch.zeros(3).double(), torch.ones(3).double()
    assert label_share(3 * guided, unguided, guided) == 1 and label_share(-guided, unguided, guided) == 0
    assert label_share(guided / 4, unguided, guided) == pytest.approx(0.25)
    assert label_share(guided, guided, guided).isnan()


def test_errors_turn_around_without_labels_and_stay_flat_with_the_estimated_share(world):
    gram, labels, across, truth = world

    def error(coefficients):
        return (across @ coefficients - truth).square().mean().item()

    alone = [error(each) for each in generations(gram, labels, 0.0, 400)]
    least = alone.index(min(alone))
    assert 0 < least < 399 and alone[-1] > 10 * alone[0]  # first less noise, then less of all
    tuned = [fitted(gram, labels)]
    for _ in range(60):
        both = [across @ fitted(gram, targets) for targets in (gram @ tuned[-1], labels)]
        share = label_share(truth, *both)
        tuned.append(fitted(gram, share * labels + (1 - share) * gram @ tuned[-1]))
    errors = [error(each) for each in tuned]
    assert max(errors[1:]) < errors[0] and max(errors[1:]) < 1.25 * min(alone)
    assert max(errors[30:]) - min(errors[30:]) < 1e-6


def test_the_softened_cross_entropy_is_both_losses_by_their_shares(draw):
    """`a l(f, y) + (1 - a) l(f, f_before)`, and its gradient is what f says less the mixed target."""
    student, before, labels = draw(6, 5).requires_grad_(), draw(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    value = progressive_cross_entropy(student, before, labels, share=0.7)
    log_q = student.log_softmax(-1)
    of_labels, of_before = -log_q[range(6), labels], -(before.softmax(-1) * log_q).sum(-1)
    torch.testing.assert_close(value, 0.3 * of_labels + 0.7 * of_before)
    target = 0.3 * torch.eye(5).double()[labels] + 0.7 * before.softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), student)[0], student.softmax(-1) - target)
    assert gradcheck(lambda z: progressive_cross_entropy(z, before, labels, share=0.7), student)
