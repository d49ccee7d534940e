"""The two fits: what each step promises, and that both end where no weights are better."""

from itertools import pairwise

import pytest
import torch

from kdlm.signal import Dense, Head, Hidden
from kdlm.teachers import fitting
from kdlm.teachers.fitting import HeldOut, expectation_maximisation, geometric_cross_entropy, geometric_weights


@pytest.mark.parametrize("seed", range(20))
def test_no_step_of_expectation_maximisation_lowers_the_likelihood(seed):
    generator = torch.Generator().manual_seed(seed)
    members = int(torch.randint(1, 6, (), generator=generator))
    log_p = -3 * torch.rand(101, members, generator=generator, dtype=torch.float64).exp()
    log_w, values = expectation_maximisation(log_p)
    assert all(later >= sooner - 1e-12 for sooner, later in pairwise(values))
    torch.testing.assert_close(log_w.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    # At the best weights, no member's likelihood ratio exceeds 1 on average (Kuhn and Tucker).
    ratio = (log_p - (log_p + log_w).logsumexp(1, keepdim=True)).exp().mean(0)
    assert ratio.max() < 1 + 2e-3


def test_a_member_that_is_never_better_gets_no_weight():
    log_p = torch.randn(300, 1, dtype=torch.float64)
    log_w, _ = expectation_maximisation(torch.cat([log_p, log_p - 1], 1))
    assert log_w.exp()[1] < 1e-3


@pytest.fixture
def pieces():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = []
    heads = Head(draw(11, 3), draw(11)), Head(2 * draw(11, 5))
    for rows in (7, 0, 20):
        labels = torch.randint(0, 11, (rows,), generator=generator)
        made.append(
            HeldOut((Hidden(draw(rows, 3), heads[0]), Dense(draw(rows, 11)), Hidden(draw(rows, 5), heads[1])), labels)
        )
    return made


@pytest.mark.parametrize("vocab", [None, 8, torch.tensor([0, 1, 4, 5, 9])], ids=["all", "first", "list"])
def test_the_gradient_of_the_geometric_means_cross_entropy_is_that_of_autograd(pieces, vocab, monkeypatch):
    monkeypatch.setattr(fitting, "LOGITS", 33 * 4)  # four rows at a time
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    total, rows = torch.zeros((), dtype=torch.float64), 0
    ids = torch.arange(11)[slice(vocab) if not isinstance(vocab, torch.Tensor) else vocab]
    for signals, labels in pieces:
        logits = [s.logits if isinstance(s, Dense) else s.head.logits(s.hidden) for s in signals]
        log_q = sum(w * z[:, ids].log_softmax(1) for w, z in zip(weights, logits, strict=True)).log_softmax(1)
        for row, label in enumerate(labels.tolist()):
            if label in ids:
                total, rows = total - log_q[row, ids.tolist().index(label)], rows + 1
    (expected,) = torch.autograd.grad(total / rows, weights)
    value, gradient = geometric_cross_entropy(pieces, vocab, weights.detach())
    torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), (total / rows).detach())
    torch.testing.assert_close(gradient, expected)


def test_the_geometric_weights_are_where_the_slope_vanishes(pieces):
    log_w = geometric_weights(lambda w: geometric_cross_entropy(pieces, None, w), 3)
    weights = log_w.exp()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    value, gradient = geometric_cross_entropy(pieces, None, weights)
    assert (weights * (gradient - (weights * gradient).sum())).abs().max() < 1e-4
    for corner in torch.eye(3, dtype=torch.float64):
        assert geometric_cross_entropy(pieces, None, corner)[0] >= value
