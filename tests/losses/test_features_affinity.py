"""CLIP's loss and affinity mimicking."""

import torch
from torch.nn.functional import kl_div, normalize

from kdlm.losses import affinity, clip_loss


def unit(draw, *shape):
    return normalize(draw(*shape), dim=-1)


def test_at_equality_the_value_is_the_teachers_entropy_and_the_gradient_nothing(draw):
    teacher = unit(draw, 6, 5), unit(draw, 6, 5)
    student = [x.clone().requires_grad_() for x in teacher]
    value = affinity(*student, *teacher, scale=3.0)
    scores = 3.0 * teacher[0] @ teacher[1].T
    entropies = [-(s.softmax(-1) * s.log_softmax(-1)).sum(-1) for s in (scores, scores.T)]
    torch.testing.assert_close(value, 0.5 * (entropies[0] + entropies[1]))
    value.sum().backward()
    assert max(x.grad.abs().max() for x in student) < 1e-12


def test_its_gradient_is_that_of_forward_kl_in_both_directions(draw):
    student, teacher = (
        [unit(draw, 6, 5).requires_grad_() for _ in range(2)],
        [unit(draw, 6, 7).requires_grad_() for _ in range(2)],
    )
    ours, theirs = (50 * a @ b.T for a, b in (student, [x.detach() for x in teacher]))
    kl = sum(
        kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum()
        for q, p in ((ours, theirs), (ours.T, theirs.T))
    )
    expected = torch.autograd.grad(0.5 * kl, student)
    found = torch.autograd.grad(affinity(*student, *teacher).sum(), [*student, *teacher], allow_unused=True)
    torch.testing.assert_close(found[:2], expected)
    assert found[2] is None and found[3] is None


def test_the_order_of_the_pairs_is_inert(draw):
    tensors, order = [unit(draw, 6, 5) for _ in range(4)], torch.randperm(6)
    torch.testing.assert_close(affinity(*(x[order] for x in tensors)), affinity(*tensors)[order])
    torch.testing.assert_close(clip_loss(*(x[order] for x in tensors[:2]), 9.0), clip_loss(*tensors[:2], 9.0)[order])


def test_clips_loss_is_the_mean_of_two_cross_entropies(draw):
    images, texts = unit(draw, 4, 5), unit(draw, 4, 5)
    scores, own = 9.0 * images @ texts.T, torch.arange(4)
    expected = (-scores.log_softmax(1)[own, own] - scores.log_softmax(0)[own, own]) / 2
    torch.testing.assert_close(clip_loss(images, texts, 9.0), expected)
