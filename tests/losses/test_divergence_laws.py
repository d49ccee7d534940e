"""Laws that every divergence of the room obeys."""

import pytest
import torch
from torch.autograd import gradcheck


def gradient(function, student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(function(student, teacher).sum(), student)[0]


def test_equal_distributions_give_zero_and_no_gradient(divergence, draw):
    z = draw(5, 41)
    assert divergence(z, z).abs().max() < 1e-12
    assert divergence(z, z + draw(5, 1)).abs().max() < 1e-12
    assert gradient(divergence, z, z).abs().max() < 1e-12


def test_no_divergence_is_negative(divergence, draw):
    assert (divergence(3 * draw(50, 17), 3 * draw(50, 17)) > 0).all()


def test_a_constant_added_to_logits_is_inert(divergence, draw):
    student, teacher = draw(5, 41), draw(5, 41)
    moved = divergence(student + draw(5, 1), teacher + draw(5, 1))
    torch.testing.assert_close(moved, divergence(student, teacher))


def test_the_order_of_the_vocabulary_is_inert(divergence, draw):
    student, teacher = draw(5, 41), 2 * draw(5, 41)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(divergence(student[:, order], teacher[:, order]), divergence(student, teacher))
    torch.testing.assert_close(
        gradient(divergence, student[:, order], teacher[:, order]), gradient(divergence, student, teacher)[:, order]
    )


def test_temperature_divides_the_logits_and_its_square_multiplies_the_value(divergence, draw):
    student, teacher = draw(5, 41), draw(5, 41)
    plain = divergence(student / 3, teacher / 3)
    torch.testing.assert_close(divergence(student, teacher, temperature=3.0, t_squared=False), plain)
    torch.testing.assert_close(divergence(student, teacher, temperature=3.0), 9 * plain)


def test_the_squared_temperature_keeps_the_gradient_of_one_order(divergence, draw):
    student, teacher = draw(5, 41), draw(5, 41)

    def norm(temperature):
        return gradient(lambda s, t: divergence(s, t, temperature=temperature), student, teacher).norm()

    norms = torch.stack([norm(t) for t in (1.0, 3.0, 10.0)])
    # Total variation is of first order in the logits' difference and the others of second.
    assert norms.max() / norms.min() < 15


def test_finite_differences_agree_with_the_gradient(differentiable, draw):
    teacher = draw(3, 7)
    student = draw(3, 7).requires_grad_()
    assert gradcheck(lambda s: differentiable(s, teacher), student)
    assert gradcheck(lambda s: differentiable(s, teacher, temperature=2.0), student)


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_logits_give_finite_values_and_gradients(divergence, draw, scale, dtype):
    student, teacher = draw(20, 41).sign().mul(scale).to(dtype), draw(20, 41).mul(scale).to(dtype)
    one_hot = torch.full((20, 41), -scale, dtype=dtype)
    one_hot[:, 0] = scale
    for a, b in [(student, teacher), (teacher, student), (one_hot, student), (student, one_hot), (one_hot, one_hot)]:
        assert divergence(a, b).isfinite().all()
        assert gradient(divergence, a, b).isfinite().all()


def test_half_precision_logits_are_widened_before_anything_else(divergence, draw):
    student, teacher = draw(5, 1271, dtype=torch.bfloat16), draw(5, 1271, dtype=torch.bfloat16)
    value = divergence(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(student.float(), teacher.float()))


def test_the_teacher_carries_no_gradient(divergence, draw):
    student, teacher = draw(5, 41).requires_grad_(), draw(5, 41).requires_grad_()
    divergence(student, teacher).sum().backward()
    assert student.grad is not None and teacher.grad is None


def test_leading_dimensions_and_strides_are_inert(divergence, draw):
    student, teacher = draw(41, 3, 4), draw(41, 3, 4)
    strided = divergence(student.movedim(0, -1), teacher.movedim(0, -1))
    assert strided.shape == (3, 4)
    flat = divergence(student.flatten(1).T.contiguous(), teacher.flatten(1).T.contiguous())
    torch.testing.assert_close(strided.flatten(), flat)
    assert divergence(student[:0].movedim(1, -1), teacher[:0].movedim(1, -1)).shape == (0, 4)


@pytest.mark.usefixtures("unchecked_types")
def test_different_vocabularies_are_refused(divergence, draw):
    with pytest.raises(ValueError, match="share"):
        divergence(draw(5, 41), draw(5, 43))


def test_a_temperature_of_zero_is_refused(divergence, draw):
    with pytest.raises(ValueError, match="temperature"):
        divergence(draw(5, 41), draw(5, 41), temperature=0.0)
