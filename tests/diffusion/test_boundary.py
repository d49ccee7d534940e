"""The boundary of a consistency function, in every form."""

import pytest
import torch
from torch import nn

from kdlm.diffusion import Boundary, FlowMatching, Level, ResidualDenoiser, VarianceExploding, VariancePreserving

FORMS = [VarianceExploding(), VariancePreserving(torch.linspace(0.9999, 0.005, 1000)), FlowMatching()]


class Fixed(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_least_noise_what_comes_out_is_what_went_in_bit_for_bit(form, dtype):
    noised, clean = torch.randn(2, 3, 5, dtype=dtype).unbind()
    level = form.level(torch.full((3,), form.first, dtype=dtype))
    assert torch.equal(Boundary()(Fixed(form), noised, level, clean), noised)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_far_from_it_what_comes_out_is_the_prediction(form):
    noised, clean = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    level = form.level(torch.full((3,), 0.9 * form.last))
    torch.testing.assert_close(Boundary(scaling=1000)(Fixed(form), noised, level, clean), clean, rtol=1e-3, atol=1e-4)


def test_it_is_the_published_mixture():
    noised, clean, form = torch.ones(1, 2), torch.zeros(1, 2), VarianceExploding(first=0.0)
    at = Level(torch.ones(1), torch.tensor([0.05]))
    assert Boundary()(Fixed(form), noised, at, clean)[0, 0] == pytest.approx(0.25 / (0.5**2 + 0.25))
    assert Boundary()(Fixed(form), clean, at, noised)[0, 0] == pytest.approx(0.5 / (0.5**2 + 0.25) ** 0.5)


def test_edms_preconditioning_has_it_nearly_by_itself():
    torch.manual_seed(0)
    net = ResidualDenoiser((5,), width=16, depth=1)
    nn.init.normal_(net.leave.weight, std=0.3)
    noised = torch.randn(3, 5)
    kept = net(noised, net.form.level(torch.full((3,), net.form.first))) - noised
    assert 0 < kept.abs().max() < 0.02
