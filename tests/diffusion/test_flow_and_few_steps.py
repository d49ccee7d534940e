"""Following a denoiser's flow in many steps, and writing samples in a few."""

import itertools

import pytest
import torch

from kdlm.diffusion import (
    ODE,
    Draws,
    FewSteps,
    FlowMatching,
    Level,
    MixtureDenoiser,
    ResidualDenoiser,
    TrigFlow,
    VarianceExploding,
    follow,
    generate,
    karras_ratios,
    moved,
    over,
    stepped,
)

CENTRES = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)


def exact() -> MixtureDenoiser:
    return MixtureDenoiser(CENTRES, 0.4, torch.tensor([0.6, 0.4], dtype=torch.float64))


def levels(count: int, batch: int, form=None) -> list[Level]:
    form = form or VarianceExploding()
    ratios = torch.tensor(karras_ratios(count, 0.01, 10.0), dtype=torch.float64)
    return [form.level(form.time(Level(torch.ones_like(r), r))) for r in ratios[:, None].expand(-1, batch)]


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("second_order", "order"), [(False, 1), (True, 2)])
def test_the_flow_of_the_exact_denoiser_converges_in_the_order_of_its_steps(second_order, order):
    start = 10 * noise(64)
    ends = [follow(exact(), start, levels(n, 64), second_order=second_order) for n in (33, 65, 129, 1025)]
    errors = [(end - ends[-1]).square().mean().sqrt().item() for end in ends[:3]]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 0.8 * 2**order


def test_an_euler_step_is_ddims():
    at, to = levels(2, 8, TrigFlow(0.5))
    start = over(at.scale, noise(8)) * noise(8)
    clean = exact()(start, at)
    eps = (start - over(at.alpha, start) * clean) / over(at.sigma, start)
    there = over(to.alpha, start) * clean + over(to.sigma, start) * eps
    torch.testing.assert_close(moved(start, clean, at, to), there)
    torch.testing.assert_close(follow(exact(), start, [at, to], second_order=False), exact()(there, to))


@pytest.mark.parametrize("second_order", [False, True])
def test_the_flow_is_the_same_on_every_path(second_order):
    start = noise(8)
    ends = []
    for form in (VarianceExploding(), FlowMatching(), TrigFlow(0.5)):
        grid = levels(9, 8, form)
        # The same point of the ray: y = x_t / alpha is that of the exploding path.
        ends.append(follow(exact(), 10 * start * over(grid[0].alpha, start), grid, second_order=second_order))
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


def test_the_flow_may_begin_at_pure_noise():
    form, start = FlowMatching(), noise(8)
    grid = [form.level(torch.full((8,), t.item(), dtype=torch.float64)) for t in torch.linspace(1, 0.02, 50)]

    def predict(noised, level):  # of data with mean 1 and standard deviation 0.5
        alpha, sigma = over(level.alpha, noised), over(level.sigma, noised)
        return 1 + alpha * 0.25 * (noised - alpha) / (alpha.square() * 0.25 + sigma.square())

    for second_order, error in ((False, 0.05), (True, 0.01)):
        end = follow(predict, start, grid, second_order=second_order)
        torch.testing.assert_close(end, 1 + 0.5 * start, rtol=0, atol=error * start.abs().max().item())


def test_a_sample_that_begins_at_pure_noise_does_not_change_the_steps_of_the_others():
    form, start = FlowMatching(), noise(8)
    at, to = (form.level(torch.tensor(t, dtype=torch.float64)) for t in ([1.0, 0.9] * 4, [0.8, 0.7] * 4))

    def predict(noised, level):
        return noised.tanh() * over(level.alpha + 1, noised)

    whole = stepped(predict, start, at, to)
    alone = [stepped(predict, start[i::2], at[i::2], to[i::2]) for i in range(2)]
    assert torch.equal(whole[0::2], alone[0]) and torch.equal(whole[1::2], alone[1])
    assert torch.equal(alone[0], stepped(predict, start[0::2], at[0::2], to[0::2], second_order=False))


def student() -> ResidualDenoiser:
    torch.manual_seed(0)
    net = ResidualDenoiser((2,), width=8, depth=1)
    torch.nn.init.normal_(net.leave.weight)
    return net


def test_a_live_step_leaves_no_graph_elsewhere():
    net, draws = student(), Draws(torch.arange(4), 0, 0)
    steps = FewSteps((8.0, 2.0, 0.5))
    for live in range(3):
        seen = []

        def predict(noised, level, seen=seen):
            seen.append((torch.is_grad_enabled(), noised.requires_grad))
            return net(noised, level)

        grid = [Level(torch.ones(4), torch.full((4,), t)) for t in (8.0, 2.0, 0.5)]
        generate(predict, lambda k: draws.normal(f"written {k}", (2,)), grid, live=live)
        assert seen == [(False, False)] * live + [(True, False)]
        clean = steps(net, draws, None, live=live)
        alone = FewSteps(steps.times[: live + 1])(net, draws, None)
        assert clean.requires_grad and torch.equal(clean, alone)
    with torch.no_grad():
        assert not steps(net, draws, None, live=1).requires_grad
    assert torch.is_grad_enabled()


def test_few_steps_add_the_next_levels_noise_to_what_they_predicted():
    net, draws = student(), Draws(torch.arange(4), 0, 0)
    first = net(65**0.5 * draws.normal("written 0", (2,)), Level(torch.ones(4), torch.full((4,), 8.0)))
    second = net(first + 2 * draws.normal("written 1", (2,)), Level(torch.ones(4), torch.full((4,), 2.0)))
    torch.testing.assert_close(FewSteps((8.0, 2.0))(net, draws, None), second)


def test_teacher_and_student_begin_with_the_same_noise():
    net, draws = student(), Draws(torch.arange(4), 0, 0)
    one_step = ODE((8.0,), second_order=False)(net, draws, None)
    torch.testing.assert_close(one_step, FewSteps((8.0,))(net, draws, None).detach())
