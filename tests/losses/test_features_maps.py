"""Attention transfer: equality, what is inert, the formula, other sizes and widths."""

import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from kdlm.losses import attention_transfer


def test_equal_maps_cost_nothing_whatever_their_scale_and_number_of_channels(draw):
    x = draw(3, 4, 5, 5)
    assert attention_transfer(x, x).abs().max() < 1e-30
    assert attention_transfer(7 * x, torch.cat([x, -x], 1)).abs().max() < 1e-12


def test_it_is_the_mean_squared_difference_of_normalised_maps_of_energy(draw):
    student, teacher = draw(3, 4, 5, 6), draw(3, 2, 5, 6)
    maps = [normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
    torch.testing.assert_close(attention_transfer(student, teacher).mean(), (maps[0] - maps[1]).pow(2).mean())


def test_the_larger_map_is_averaged_to_the_smaller_on_either_side(draw):
    small = draw(3, 4, 2, 2)
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert attention_transfer(small, large).max() < 1e-24 and attention_transfer(large, small).max() < 1e-24


def test_the_gradient_is_that_of_the_value_and_the_teachers_is_none(draw):
    student, teacher = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, 2, 2).requires_grad_()
    assert gradcheck(lambda x: attention_transfer(x, teacher), student)
    attention_transfer(student, teacher).sum().backward()
    assert teacher.grad is None
