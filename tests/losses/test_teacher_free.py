"""Soft labels without a teacher: USKD's two and PS-KD's."""

from functools import partial

import pytest
import torch
from linear_pair import VOCAB, Allocations, assert_same, leaves, logits
from torch.autograd import gradcheck
from torch.nn.functional import one_hot

from kdlm.losses import (
    IGNORE_INDEX,
    chunked,
    cross_entropy,
    forward_kl,
    progressive_cross_entropy,
    token_log_probs,
    uskd,
    uskd_others,
    uskd_target,
)


@pytest.fixture
def pick():
    """Return a function that draws labels, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda rows, vocab: torch.randint(vocab, (rows,), generator=generator)


def gradient(value, student):
    return torch.autograd.grad(value.sum(), student, retain_graph=True)[0]


def by_the_book(student, weak, labels, alpha, beta):
    """Row by row on probabilities, classes gathered and sorted; the batch mean is taken over these rows."""
    q, w = student.softmax(-1), weak.softmax(-1)
    squares = torch.stack([row[y] ** 2 for row, y in zip(q, labels.tolist(), strict=True)]).detach()
    values = []
    for z, s, v, y, square in zip(student, q.detach(), w, labels.tolist(), squares, strict=True):
        score = v / (1 - v[y]) + s / (1 - s[y])
        zipf = torch.zeros_like(score)
        for rank, place in enumerate(sorted(range(len(z)), key=lambda c, score=score: -score[c].item())):
            zipf[place] = 1 / (rank + 1)
        others = [c for c in range(len(z)) if c != y]
        soft = zipf[others] / zipf[others].sum()
        of_label = -(square + 1 - squares.mean()) * z.log_softmax(-1)[y]
        values.append(alpha * of_label - beta * (soft * z[others].log_softmax(-1)).sum())
    return torch.stack(values), squares.mean()


@pytest.mark.parametrize("weights", [(1.0, 0.1), (0.5, 2.0)])
def test_uskd_has_the_values_and_gradients_of_its_formula(draw, pick, weights):
    student, weak, labels = (2 * draw(20, 11)).requires_grad_(), 2 * draw(20, 11), pick(20, 11)
    expected, mean = by_the_book(student, weak, labels, *weights)
    ours = uskd(student, weak, labels, mean_square=mean, alpha=weights[0], beta=weights[1])
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient(ours, student), gradient(expected, student))


def test_the_soft_labels_of_the_others_add_up_to_one_and_follow_the_order_only(draw, pick):
    student, weak, labels = draw(30, 17), draw(30, 17), pick(30, 17)
    soft = uskd_others(student, weak, labels)
    at_label = one_hot(labels, 17).bool()
    torch.testing.assert_close(soft.sum(-1), torch.ones(30).double())
    assert (soft[at_label] == 0).all() and (soft[~at_label] > 0).all()
    same = draw(30, 17)
    alone = uskd_others(same, same, labels)
    assert torch.equal(alone, uskd_others(3 * same, 3 * same, labels))  # another distribution, the same order
    others = [[c for c in range(17) if c != y] for y in labels.tolist()]
    for row, places in enumerate(others):
        order = same[row, places].argsort(descending=True)
        assert (alone[row, places][order].diff() < 0).all()


def test_the_soft_label_of_the_target_is_one_on_average_and_carries_no_gradient(draw, pick):
    student, labels = (3 * draw(50, 17)).requires_grad_(), pick(50, 17)
    squares = student.softmax(-1).gather(-1, labels[:, None]).squeeze(-1).square().detach()
    soft = uskd_target(student, labels, squares.mean())
    assert not soft.requires_grad and soft.mean().item() == pytest.approx(1)
    torch.testing.assert_close(soft - 1, squares - squares.mean())
    assert (uskd_target(student, labels, 1.0) >= 0).all()


def test_the_mean_of_a_whole_batch_makes_its_cuts_inert(models, pick):
    student, weak = models()
    labels = pick(len(student.hidden), VOCAB)
    with torch.no_grad():
        mean = token_log_probs(student, labels)[0].mul(2).exp().mean()
    loss = partial(uskd, mean_square=mean)
    expected, own = by_the_book(logits(student), logits(weak), labels, 1.0, 0.1)
    torch.testing.assert_close(mean, own)
    assert_same(chunked(loss, student, weak, labels, chunk_rows=7), expected, student)
    with Allocations(*leaves(student), weak.head.weight) as seen:
        chunked(loss, student, weak, labels, chunk_rows=7).sum().backward()
    assert max(seen.sizes) == 7 * VOCAB


def test_a_row_without_a_label_gives_uskd_nothing(draw, pick):
    student, weak, labels = draw(8, 17).requires_grad_(), draw(8, 17).requires_grad_(), pick(8, 17)
    some = torch.where(torch.arange(8) % 2 == 0, labels, IGNORE_INDEX)
    value = uskd(student, weak, some, mean_square=0.1)
    found = gradient(value, student)
    assert (value[1::2] == 0).all() and (found[1::2] == 0).all()
    torch.testing.assert_close(value[::2], uskd(student, weak, labels, mean_square=0.1)[::2])
    value.sum().backward()
    assert weak.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(draw, pick, dtype):
    labels = pick(20, 41)
    sure, spread = one_hot(labels, 41).mul(2e4).sub(1e4).to(dtype), draw(20, 41).mul(1e4).to(dtype)
    for student, other in [(sure, spread), (spread, sure), (sure, sure), (-sure, sure)]:
        leaf = student.clone().requires_grad_()
        for loss in (partial(uskd, mean_square=0.5), partial(progressive_cross_entropy, share=0.3)):
            value = loss(leaf, other, labels)
            assert value.dtype == torch.float32 and value.isfinite().all()
            assert gradient(value, leaf).isfinite().all()


def test_the_progressive_target_mixes_the_label_with_what_was_predicted(draw, pick):
    student, previous, labels = draw(9, 17).requires_grad_(), draw(9, 17).requires_grad_(), pick(9, 17)
    for share in (0.0, 0.3, 1.0, draw(9).sigmoid()):
        of_row = share[:, None] if isinstance(share, torch.Tensor) else share
        target = (1 - of_row) * one_hot(labels, 17) + of_row * previous.detach().softmax(-1)
        value = progressive_cross_entropy(student, previous, labels, share=share)
        torch.testing.assert_close(value, -(target * student.log_softmax(-1)).sum(-1))
        torch.testing.assert_close(gradient(value, student), student.softmax(-1) - target)
    assert torch.autograd.grad(value.sum(), previous, allow_unused=True) == (None,)


def test_without_a_share_it_is_cross_entropy_and_with_all_of_it_forward_kl_and_an_entropy(draw, pick):
    student, previous, labels = draw(9, 17), draw(9, 17), pick(9, 17)
    labels[0] = IGNORE_INDEX
    loss = partial(progressive_cross_entropy, student, previous, labels)
    torch.testing.assert_close(loss(share=0.0), cross_entropy(student, labels))
    entropy = progressive_cross_entropy(previous, previous, labels, share=1.0)
    torch.testing.assert_close(loss(share=1.0), forward_kl(student, previous) + entropy)
    torch.testing.assert_close(loss(share=0.3)[0], 0.3 * loss(share=1.0)[0])  # no label: the second part alone


def test_finite_differences_agree_with_the_gradient(draw, pick):
    other, labels = draw(4, 7), pick(4, 7)
    assert gradcheck(lambda z: progressive_cross_entropy(z, other, labels, share=0.4), draw(4, 7).requires_grad_())


def test_the_progressive_target_comes_in_chunks(models, pick):
    student, previous = models()
    labels = pick(len(student.hidden), VOCAB)
    loss = partial(progressive_cross_entropy, share=0.4)
    expected = loss(logits(student), logits(previous), labels)
    assert_same(chunked(loss, student, previous, labels, chunk_rows=7), expected, student)
