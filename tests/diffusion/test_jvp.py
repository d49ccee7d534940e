"""The derivative of a denoiser along a path: forward mode against differences, in every form, under dropout."""

import pytest
import torch
from torch import nn

from kdlm.diffusion import (
    FlowMatching,
    MixtureDenoiser,
    ResidualDenoiser,
    TrigFlow,
    VarianceExploding,
    VariancePreserving,
    derivative,
    over,
    rewound,
)

FORMS = {
    "exploding": VarianceExploding(),
    "preserving": VariancePreserving(torch.linspace(0.9999**0.5, 0.0047**0.5, 1000).double().square()),
    "flow": FlowMatching(),
    "trig": TrigFlow(0.5),
}
TIMES = {
    "exploding": [0.05, 0.5, 5.0],
    "preserving": [20.5, 200.5, 400.5],  # differences stay between two rows of the table
    "flow": [0.05, 0.5, 0.8],
    "trig": [0.1, 0.8, 1.4],
}


def network() -> ResidualDenoiser:
    torch.manual_seed(0)
    net = ResidualDenoiser((5,), width=16, depth=2)
    nn.init.normal_(net.leave.weight, std=0.3)
    return net.double()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_and_differences_agree_along_every_form(form):
    path, time, net = FORMS[form], torch.tensor(TIMES[form], dtype=torch.float64), network()
    span = 1000.0 if form == "preserving" else 1.0  # of the form's time
    noised, velocity, factor = normal(3, 5), normal(3, 5, seed=1) / span, torch.tensor([1.0, 0.5, 0.1]).double() * span

    def predict(x, t):
        return net(x, path.level(t))

    forward = derivative(predict, noised, time, velocity, factor=factor)
    difference = derivative(predict, noised, time, velocity, factor=factor, how="difference")
    torch.testing.assert_close(difference, forward, rtol=1e-3, atol=1e-4)
    assert forward.abs().max() > 0.1 and not forward.requires_grad and not difference.requires_grad


def test_the_factor_inside_the_tangents_is_the_factor_outside():
    path, net, time = TrigFlow(0.5), network(), torch.tensor([0.1, 0.8, 1.4]).double()
    noised, velocity = normal(3, 5), normal(3, 5, seed=1)

    def predict(x, t):
        return net(x, path.level(t))

    plain = derivative(predict, noised, time, velocity, factor=torch.ones_like(time))
    scaled = derivative(predict, noised, time, velocity, factor=time.cos() * time.sin())
    torch.testing.assert_close(scaled, over(time.cos() * time.sin(), plain) * plain, rtol=1e-10, atol=1e-12)


def test_the_derivative_of_the_exact_gaussian_denoiser_is_its_closed_form():
    # One component at 0 of variance s^2: f(y, r) = s^2 y / (s^2 + r^2), so df/dr along dy/dr = v is known.
    s, net = 0.7, MixtureDenoiser(torch.zeros(1, 5).double(), 0.7, torch.ones(1).double())
    noised, velocity, ratio = normal(3, 5), normal(3, 5, seed=1), torch.tensor([0.1, 1.0, 9.0]).double()
    total = over(s**2 + ratio**2, noised)
    expected = s**2 * velocity / total - 2 * over(ratio, noised) * s**2 * noised / total**2

    def predict(x, r):
        return net(x, VarianceExploding().level(r))

    found = derivative(predict, noised, ratio, velocity, factor=torch.ones_like(ratio))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Dropping(ResidualDenoiser):
    """With dropout on its hidden layer, whose mask decides the answer."""

    def predict(self, noised, time, condition, guidance):
        return nn.functional.dropout(super().predict(noised, time, condition, guidance), 0.5, self.training)


@pytest.mark.parametrize("how", ["forward", "difference"])
def test_a_derivative_that_is_rewound_drops_what_the_next_evaluation_drops(how):
    torch.manual_seed(0)
    net, path = Dropping((200,), width=8, depth=1).train(), TrigFlow(0.5)
    noised, velocity, time = normal(2, 200).float(), normal(2, 200, seed=1).float(), torch.tensor([0.3, 1.0])

    def predict(x, t):
        return net(x, path.level(t))

    with rewound(noised):
        rate = derivative(predict, noised, time, velocity, factor=torch.ones(2), how=how)
    assert torch.equal(rate == 0, predict(noised, time) == 0)
    assert not torch.equal(rate == 0, predict(noised, time) == 0)  # a further draw is another one


def test_a_time_in_half_precision_is_refused():
    x, t = torch.ones(1, 5), torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs the time in float32"):
        derivative(lambda a, b: a, x, t, x, factor=t)


def test_attention_has_a_derivative():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def predict(x, t):
        return layer(x * over(t, x), x, x, need_weights=False)[0]

    arguments = normal(2, 4, 8), torch.tensor([0.5, 1.0]).double(), normal(2, 4, 8, seed=1)
    rates = [
        derivative(predict, *arguments, factor=torch.ones(2).double(), how=how) for how in ("forward", "difference")
    ]
    torch.testing.assert_close(*rates, rtol=1e-4, atol=1e-6)
