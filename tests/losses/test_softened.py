"""CurioSFT's anchor: temperatures by bisection, and the squared difference of two log-probabilities."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from kdlm.losses import (
    IGNORE_INDEX,
    CrossEntropy,
    Softened,
    chunked,
    cross_entropy,
    softened_anchor,
    softening,
    weighted_sum,
)
from kdlm.signal import Dense, TopK


def entropy(logits, temperature=1.0):
    log_p = (logits / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def wanted(now):
    return now + torch.sigmoid(2 * (now - 1.2)) / 2


@pytest.fixture
def reference(draw):
    """Rows from almost certain to almost even."""
    return torch.linspace(0.1, 6, 60, dtype=torch.float64)[:, None] * draw(60, 23)


def test_the_entropy_rises_with_the_temperature_and_so_does_what_is_wanted(reference):
    temperatures = torch.linspace(1.0, 1.6, 25, dtype=torch.float64)
    rising = torch.stack([entropy(reference, t) for t in temperatures])
    assert (rising.diff(dim=0) > 0).all()
    assert (wanted(entropy(reference)) >= entropy(reference)).all()


def test_the_temperature_is_the_one_that_was_sought_or_an_end_of_the_range(reference):
    """The bracket halves twenty times, so each answer is within 2^-20 of the range of the true one."""
    found, target = softening(reference), wanted(entropy(reference))
    width = 0.4 / 2**20
    low, high = (entropy(reference, t) for t in (1.1, 1.5))
    certain = entropy(reference) <= 0.03
    assert (found[certain] == 1.1).all() and certain.any()
    short, far = (target <= low) & ~certain, (target >= high) & ~certain
    between = ~(short | far | certain)
    assert short.sum() + far.sum() > 5 and between.sum() > 5
    assert ((found[short] - 1.1).abs() <= width).all() and ((found[far] - 1.5).abs() <= width).all()
    around = [entropy(reference[between], (found[between] + side).unsqueeze(-1)) for side in (-width, width)]
    assert (around[0] <= target[between]).all() and (target[between] <= around[1]).all()


def test_a_less_certain_row_is_softened_more_where_it_can_be(draw):
    base = draw(23)
    sharper = torch.linspace(3, 0.6, 20, dtype=torch.float64)[:, None] * base
    found = softening(sharper, low=1.0, high=50.0)
    assert (entropy(sharper).diff() > 0).all()
    grown = entropy(sharper, found.unsqueeze(-1)) - entropy(sharper)
    reached = found < 49
    assert reached.sum() > 5 and (grown[reached].diff() > 0).all()


def test_the_temperature_looks_at_the_largest_logits_alone(draw):
    logits = 2 * draw(9, 40)
    largest = logits.topk(7).values
    spread = torch.cat([largest, logits.topk(40).values[:, 7:] - 0.5], -1)[:, torch.randperm(40)]
    torch.testing.assert_close(softening(logits, top=7), softening(spread, top=7))
    torch.testing.assert_close(softening(logits, top=7), softening(largest))
    assert not torch.allclose(softening(logits, top=7), softening(logits))


def test_the_anchor_is_nothing_at_the_softened_reference_in_value_and_gradient(reference):
    labels = torch.arange(60) % 23
    student = (reference / softening(reference).unsqueeze(-1)).requires_grad_()
    value = softened_anchor(student, reference, labels)
    assert torch.equal(value, torch.zeros(60).double())
    assert torch.equal(torch.autograd.grad(value.sum(), student)[0], torch.zeros_like(student))


def test_the_gradient_is_that_of_its_formula_and_none_reaches_the_reference(draw):
    student, reference = draw(5, 7).requires_grad_(), (2 * draw(5, 7)).requires_grad_()
    labels = torch.tensor([0, 6, IGNORE_INDEX, 3, 3])
    assert gradcheck(lambda z: softened_anchor(z, reference.detach(), labels), student)
    value = softened_anchor(student, reference, labels)
    assert value[2] == 0
    grad = torch.autograd.grad(value.sum(), [student, reference], allow_unused=True)
    assert grad[1] is None and (grad[0][2] == 0).all()
    kept = labels != IGNORE_INDEX
    log_p = (reference / softening(reference).unsqueeze(-1)).log_softmax(-1).detach()
    difference = (student.log_softmax(-1) - log_p)[kept, labels[kept]]
    away = torch.eye(7).double()[labels[kept]] - student.softmax(-1)[kept]
    torch.testing.assert_close(grad[0][kept], difference[:, None] * away)
    torch.testing.assert_close(value[kept], difference.square() / 2)


def test_a_label_more_probable_than_the_softened_reference_allows_is_let_go_of():
    """Cross-entropy alone always pulls the label up; beside the anchor it stops pulling once q = e p~."""
    reference = torch.zeros(1, 5).double()
    for share, rises in ((0.3, True), (0.9, False)):
        rest = math.log((1 - share) / 4)
        student = torch.tensor([[math.log(share), rest, rest, rest, rest]]).double().requires_grad_()
        label = torch.tensor([0])
        value = cross_entropy(student, label) + softened_anchor(student, reference, label)
        assert (torch.autograd.grad(value.sum(), student)[0][0, 0] < 0) == rises


def test_chunks_give_what_whole_rows_give(draw):
    student, reference, labels = draw(33, 19).requires_grad_(), draw(33, 19), torch.arange(33) % 19
    whole = softened_anchor(student, reference, labels)
    cut = chunked(partial(softened_anchor), Dense(student), Dense(reference), labels, chunk_rows=4)
    torch.testing.assert_close(cut, whole)
    both = (torch.autograd.grad(value.sum(), student)[0] for value in (cut, whole))
    torch.testing.assert_close(*both)
    terms = [("cross_entropy", CrossEntropy(), 1.0), ("anchor", Softened(), 1.0)]
    total, parts = weighted_sum(terms, Dense(student), Dense(reference), labels, chunk_rows=5)
    torch.testing.assert_close(parts["anchor"], whole.detach())
    torch.testing.assert_close(total, cross_entropy(student, labels) + whole)


def test_a_reference_of_a_few_tokens_is_refused():
    few = TopK(torch.tensor([[0, 1]]), torch.tensor([[-1.0, -2.0]]))
    with pytest.raises(ValueError, match="curio_sft takes a reference that gives whole distributions, got a TopK"):
        Softened()(torch.zeros(1, 5), few, torch.tensor([0]))
