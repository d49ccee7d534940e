"""Relational KD on embeddings: what is inert, what rows without distance do, and that angles can be learned."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import smooth_l1_loss

from kdlm.losses import rkd_angle, rkd_distance


@pytest.fixture(params=[rkd_distance, rkd_angle], ids=["distance", "angle"])
def relation(request):
    return request.param


def turned(x, draw):
    """Return the rows turned, made three times as long and moved."""
    width = x.shape[1]
    return 3 * x @ torch.linalg.qr(draw(width, width))[0] + draw(width)


def test_rows_turned_scaled_and_moved_give_zero_and_no_gradient(relation, draw):
    x = draw(7, 5)
    student = turned(x, draw).requires_grad_()
    value = relation(student, x)
    assert value.shape == (7,) and value.max() < 1e-12
    assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-9


def test_either_side_may_be_turned_scaled_and_moved_or_narrower(relation, draw):
    student, teacher = draw(7, 5), draw(7, 11)
    value = relation(student, teacher)
    assert (value > 0).all()
    torch.testing.assert_close(relation(turned(student, draw), turned(teacher, draw)), value)


def test_distances_are_those_of_the_formula(draw):
    student, teacher = draw(6, 5).requires_grad_(), draw(6, 4)

    def distances(x):
        d = torch.stack([torch.stack([((a - b) ** 2).sum() for b in x]) for a in x])
        d = torch.where(d > 0, d.clamp(min=1e-30).sqrt(), 0.0)
        return d / d[d > 0].mean()

    errors = smooth_l1_loss(distances(student), distances(teacher), reduction="none")
    off = ~torch.eye(6, dtype=torch.bool)
    expected = torch.stack([row[kept].mean() for row, kept in zip(errors, off, strict=True)])
    value = rkd_distance(student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(value.mean() * 5 / 6, errors.mean())  # the released code's reduction
    ours, plain = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (value, expected))
    torch.testing.assert_close(ours, plain)


def test_angles_are_those_of_the_formula(draw):
    student, teacher = draw(5, 4).requires_grad_(), draw(5, 3)

    def cosine(x, i, j, k):
        return torch.nn.functional.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)

    expected = []
    for i in range(5):
        pairs = [(j, k) for j in range(5) for k in range(5) if len({i, j, k}) == 3]
        errors = [smooth_l1_loss(cosine(student, i, j, k), cosine(teacher, i, j, k)) for j, k in pairs]
        expected.append(torch.stack(errors).mean())
    expected = torch.stack(expected)
    value = rkd_angle(student, teacher)
    torch.testing.assert_close(value, expected)
    ours, plain = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (value, expected))
    torch.testing.assert_close(ours, plain)


def test_finite_differences_agree_with_the_gradient(relation, draw):
    teacher = draw(5, 3)
    assert gradcheck(lambda x: relation(x, teacher), draw(5, 4).requires_grad_())


def test_the_order_of_the_rows_is_inert(relation, draw):
    student, teacher = draw(7, 5), draw(7, 5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relation(student[order], teacher[order]), relation(student, teacher)[order])


def test_equal_rows_on_either_side_give_finite_values_and_gradients(relation, draw):
    apart, pairs, one = draw(6, 4), draw(3, 4).repeat(2, 1), torch.ones(6, 4).double()
    for student, teacher in [(pairs, apart), (apart, pairs), (one, apart), (apart, one), (one, one)]:
        leaf = student.clone().requires_grad_()
        value = relation(leaf, teacher)
        (found,) = torch.autograd.grad(value.sum(), leaf)
        assert value.isfinite().all() and found.isfinite().all() and found.abs().max() < 100
    assert relation(one, one).abs().max() == 0


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_rows_without_enough_others_give_zero(relation, draw, rows):
    student = draw(rows, 4).requires_grad_()
    value = relation(student, draw(rows, 3))
    value.sum().backward()
    assert value.shape == (rows,) and (value == 0).all() and (student.grad == 0).all()


def test_the_teacher_carries_no_gradient_and_half_precision_is_widened(relation, draw):
    student, teacher = (draw(7, 5, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    value = relation(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, relation(student.float(), teacher.float()))
    value.sum().backward()
    assert student.grad is not None and teacher.grad is None


def test_a_student_that_learns_them_finds_the_teachers_neighbours(relation, draw):
    teacher = draw(30, 3)
    student = (0.1 * draw(30, 8)).requires_grad_()

    def neighbours(x):
        return torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(-1)

    before = (neighbours(student.detach()) == neighbours(teacher)).double().mean()
    optimiser = torch.optim.Adam([student], lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        relation(student, teacher).sum().backward()
        optimiser.step()
    after = (neighbours(student.detach()) == neighbours(teacher)).double().mean()
    assert before < 0.3 and after > 0.8
