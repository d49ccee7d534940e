"""sCM and rCM: the tangent is the papers', 0 for the closed form of Gaussian data, and bounded; what moves when."""

import gaussian
import pytest
import torch
from torch import nn

from kdlm.diffusion import FlowMatching, Karras, LogNormal, ResidualDenoiser, TrigFlow, VariancePreserving, over
from kdlm.methods import ContinuousConsistency, ScoreRegularisedConsistency, Step, Trainable
from kdlm.methods.diffusion.continuous_consistency import LogVariance
from kdlm.methods.diffusion.method import draws_of, trainable_copy

SD = 0.5
TIMES = torch.linspace(0.02, 1.55, 16, dtype=torch.float64)
PATH = TrigFlow(SD)


def scm(**options) -> ContinuousConsistency:
    return ContinuousConsistency(**{"steps": [8.0], "times": LogNormal(), "adaptive": False, "warmup": 10} | options)


def rcm(**options) -> ScoreRegularisedConsistency:
    chosen = {"steps": [8.0], "times": LogNormal(), "adaptive": False, "warmup": 10, "matching_times": Karras()}
    return ScoreRegularisedConsistency(**chosen | options)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> ResidualDenoiser:
    torch.manual_seed(seed)
    net = ResidualDenoiser((4,), width=16, depth=1, sigma_data=SD)
    nn.init.normal_(net.leave.weight, std=0.5)
    return net.double()


def tangent_of(method, student, noised, velocity, share: float) -> torch.Tensor:
    rate = method.rate(student, noised, TIMES, velocity, None)
    clean = student(noised, PATH.level(TIMES), None).detach()
    return method.tangent(clean, rate, noised, TIMES, velocity, share)


def of_the_papers(student, noised, velocity, share: float, *, regularised: bool) -> torch.Tensor:
    """The formulas, in F and with autograd's double-backward derivative of it."""
    cos, sin = TIMES.cos()[:, None], TIMES.sin()[:, None]

    def f_of(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # F(x_t / s, t)
        return (t.cos()[:, None] * x * SD - student(x * SD, PATH.level(t))) / (SD * t.sin()[:, None])

    arguments, tangents = (noised / SD, TIMES), (cos * sin * velocity / SD, (cos * sin)[:, 0])
    value, moved = f_of(*arguments), torch.autograd.functional.jvp(f_of, arguments, tangents)[1]
    assert isinstance(moved, torch.Tensor)
    apart = SD * value - velocity
    first = cos * (1 - share**2 * sin**2).sqrt() * apart if regularised else cos**2 * apart
    return (-first - share * (cos * sin * noised + SD * moved)).detach()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("made", [scm, rcm])
def test_the_tangent_is_the_papers(made, share):
    student, noised, velocity = network(), normal(16, 4), normal(16, 4, seed=1)
    found = tangent_of(made(), student, noised, velocity, share)
    expected = of_the_papers(student, noised, velocity, share, regularised=made is rcm)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


FORMS = [
    (None, "sample"),
    (FlowMatching(), "flow"),
    (VariancePreserving(torch.linspace(0.9999, 1e-4, 1000).double()), "v_prediction"),
    (TrigFlow(SD), "sample"),
]


@pytest.mark.parametrize(("form", "prediction"), FORMS, ids=[prediction for _, prediction in FORMS[:3]] + ["trig"])
@pytest.mark.parametrize("made", [scm, rcm])
def test_the_closed_form_of_gaussian_data_has_no_tangent_whatever_the_students_form(made, form, prediction):
    student, noised = gaussian.ConsistencyMap(form, prediction), normal(16, 4)
    slope = made().slope(gaussian.teacher()(noised, PATH.level(TIMES)), noised, TIMES)
    found = tangent_of(made(), student, noised, slope, 1.0)
    assert found.abs().max() < 1e-9
    assert tangent_of(made(), student, noised, 1.1 * slope, 1.0).abs().max() > 1e-3


def test_the_path_through_a_sample_and_its_noise_is_the_slope_of_a_teacher_that_knows_the_sample():
    clean, noise = normal(16, 4), normal(16, 4, seed=1)
    noised = PATH.level(TIMES).noised(clean, noise)
    along = over(TIMES.cos() * SD, noise) * noise - over(TIMES.sin(), noise) * clean
    torch.testing.assert_close(scm().slope(clean, noised, TIMES), along, rtol=1e-9, atol=1e-9)


def test_a_normalised_tangent_is_bounded_and_keeps_its_direction():
    tangent = normal(3, 2, 2) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    found = scm().normalised(tangent)
    size = tangent.square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(found.square().flatten(1).mean(1).sqrt(), size / (size + 0.1))
    torch.testing.assert_close(found * over(size + 0.1, tangent), tangent)


def test_the_derivative_comes_in_over_the_warm_up():
    assert [scm().warmth(Step(index, 100)) for index in (0, 5, 10, 50)] == [0.0, 0.5, 1.0, 1.0]
    assert scm(warmup=0).warmth(Step(0, 100)) == 1.0


def run(method, nets, step: int = 20, active=frozenset({"student"}), rows=None):
    return method.losses(nets, gaussian.batch() if rows is None else rows, active, Step(step, 100, seed=2)).terms


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_the_gradient_moves_the_students_prediction_along_the_tangent(source, monkeypatch):
    # To an offset of f, |(f - f^-) / (s sin t) + g|^2 / D / ratio has the gradient 2 g / (D s sin t ratio).
    student, method, seen = gaussian.ConsistencyMap(), scm(source=source, warmup=40, weight="inverse_ratio"), []
    normalised = type(method).normalised
    monkeypatch.setattr(method, "normalised", lambda g: seen.append(normalised(method, g)) or seen[0])
    times = []
    rate = type(method).rate
    monkeypatch.setattr(method, "rate", lambda *a: times.append(a[2]) or rate(method, *a))
    term = run(method, {"student": student, "teacher": gaussian.teacher()})["consistency"]
    term.sum.backward()
    weight = 2 / (4 * SD * times[0].sin() * SD * times[0].tan())
    torch.testing.assert_close(student.offset.grad, (over(weight, seen[0]) * seen[0]).sum(0), rtol=1e-5, atol=1e-7)
    assert seen[0].abs().max() > 1e-3
    value = (seen[0].square().mean(1) / (SD * times[0].tan())).sum()
    torch.testing.assert_close(term.sum.detach(), value, rtol=1e-5, atol=1e-7)


def test_the_tangents_of_data_are_those_of_the_teacher_on_average():
    # df/dt is linear in dx/dt, and the mean of the data's dx/dt at a given x_t is the teacher's.
    level = PATH.level(torch.full((20_000,), 0.9, dtype=torch.float64))
    clean = gaussian.MEAN + gaussian.STD * normal(20_000, 4)
    posterior = gaussian.teacher()(noised := level.noised(clean, normal(20_000, 4, seed=1)), level)
    time = torch.full((20_000,), 0.9, dtype=torch.float64)
    gap = scm().slope(clean, noised, time) - scm().slope(posterior, noised, time)
    for weight in (1, noised, noised.square()):
        assert (weight * gap).mean(0).abs().max() < 4 * (weight * gap).std() / 20_000**0.5


def test_forward_mode_and_differences_give_the_same_gradient():
    student, gradients = network(), []
    for how in ("forward", "difference"):
        student.zero_grad()
        run(scm(differentiation=how), {"student": student, "teacher": gaussian.teacher()})["consistency"].sum.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


def test_micro_batches_do_not_change_the_sum():
    nets, rows = {"student": network(), "teacher": gaussian.teacher()}, gaussian.batch()
    parts = [{key: value[part] for key, value in rows.items()} for part in (slice(0, 5), slice(5, 16))]
    whole = run(scm(), nets)["consistency"].sum
    torch.testing.assert_close(sum(run(scm(), nets, rows=part)["consistency"].sum for part in parts), whole)


def test_a_learned_log_variance_begins_without_effect_and_is_no_part_of_the_student():
    method, learned = scm(adaptive=True), LogVariance().double()
    nets = {"student": network(), "teacher": gaussian.teacher(), "log_variance": learned}
    weighed = run(method, nets)["consistency"].sum
    torch.testing.assert_close(weighed, run(scm(), nets)["consistency"].sum)
    weighed.backward()
    gradient = learned.leave.weight.grad
    assert gradient is not None and gradient.any()
    assert isinstance(method.roles["log_variance"], Trainable) and method.exported == "student"


def test_without_a_teacher_none_is_needed():
    assert scm(source="data").needs == frozenset({"samples"})
    assert "teacher.denoiser" in scm().needs and "teacher.denoiser" in rcm(source="data").needs


# rCM


def test_the_student_is_alone_until_the_warm_up_is_over_and_then_takes_turns_with_the_fake_network():
    moving = [sorted(rcm(warmup=3, ratio=3, adaptive=True).active(step)) for step in range(9)]
    student, fake = ["log_variance", "student"], ["fake"]
    assert moving == [student, student, student, student, fake, fake, student, fake, fake]


def networks(method) -> dict:
    teacher = network(3)
    fake = trainable_copy(teacher)
    nn.init.normal_(fake.get_parameter("leave.weight"), std=0.4)
    return {"student": network(), "teacher": teacher.requires_grad_(False), "fake": fake}


def test_each_step_has_the_terms_of_what_moves():
    method = rcm(warmup=10, ratio=2)
    nets = networks(method)
    rows = {key: value.float() if key == "samples" else value for key, value in gaussian.batch().items()}
    nets = {name: net.float() for name, net in nets.items()}
    assert set(run(method, nets, 4, method.active(4), rows)) == {"consistency"}
    assert set(run(method, nets, 10, method.active(10), rows)) == {"consistency", "matching"}
    assert set(run(method, nets, 11, method.active(11), rows)) == {"fake"}
    evaluated = method.evaluate(nets, rows, Step(4, 100)).terms
    assert set(evaluated) == {"consistency", "matching", "fake"}


def test_the_students_losses_leave_the_fake_network_alone_and_its_loss_the_student():
    method = rcm(warmup=0, ratio=2)
    nets = {name: net.float() for name, net in networks(method).items()}
    rows = {key: value.float() if key == "samples" else value for key, value in gaussian.batch().items()}
    for term in run(method, nets, 0, frozenset({"student"}), rows).values():
        term.sum.backward()
    assert all(p.grad is None for p in nets["fake"].parameters())
    before = [p.grad.clone() for p in nets["student"].parameters() if p.grad is not None]
    run(method, nets, 1, frozenset({"fake"}), rows)["fake"].sum.backward()
    after = [p.grad for p in nets["student"].parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and before
    assert any(p.grad is not None and p.grad.any() for p in nets["fake"].parameters())
    assert all(p.grad is None for p in nets["teacher"].parameters())


def test_without_matching_it_is_scm_once_the_warm_up_is_over():
    nets = {"student": network(), "teacher": gaussian.teacher()}
    step = Step(20, 100, seed=2)
    rows, draws = gaussian.batch(), draws_of(gaussian.batch(), step)
    plain, regularised = (m.consistency(nets, rows["samples"], draws, None, step) for m in (scm(), rcm()))
    torch.testing.assert_close(plain, regularised)
