"""Reflow: velocities along straight lines, pairs that are made once, and how straight a flow is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_denoisers import batch_of, denoiser, equal, mixture, rows, run, weights

from kdlm.data import stacked
from kdlm.diffusion import ODE, Draws, FlowMatching, Karras, Level, MixtureDenoiser, Solver, karras_ratios
from kdlm.methods import Preparation, Reflow, Step
from kdlm.methods.diffusion.reflow import PREPARATION, StraightSteps, distance, straightness, times_of

STEP = Step(0, 10, seed=3)


def context(teacher, count: int = 12, batch_size: int = 5) -> Preparation:
    return Preparation({"teacher": teacher}, rows(count), stacked, 3, torch.device("cpu"), batch_size)


def pairs_of(method: Reflow, teacher) -> dict:
    return method.prepare(context(teacher)).columns


def test_the_loss_is_the_error_of_the_velocity_on_the_line() -> None:
    student, batch = denoiser(1).double(), batch_of(double=True)
    noise = torch.randn_like(batch["samples"])
    terms = Reflow().losses({"student": student}, {**batch, "noise": noise}, frozenset({"student"}), STEP)
    first, last = times_of(student, noise)
    t = first + Draws(batch["index"], 3, 0).uniform("time").double() * (last - first)
    noised = (1 - t[:, None]) * batch["samples"] + t[:, None] * noise
    clean = student(noised, FlowMatching().level(t), {"labels": batch["labels"]})
    error = (noised - clean) / t[:, None] - (noise - batch["samples"])
    torch.testing.assert_close(terms.terms["pairs"].sum, error.square().mean(1).sum())


@pytest.mark.parametrize("target", ["straight", "one_step"])
def test_a_student_that_knows_the_samples_has_loss_zero(target: Any) -> None:
    batch = batch_of()

    class Knows:
        form = denoiser().form

        def __call__(self, noised, level, condition):
            return batch["samples"]

    noise = torch.randn_like(batch["samples"])
    terms = Reflow(target=target).losses({"student": Knows()}, {**batch, "noise": noise}, frozenset(), STEP)
    assert terms.terms["pairs"].sum < 1e-6


def test_pairs_join_the_samplers_noise_with_the_teachers_samples_and_keep_their_conditions() -> None:
    teacher = denoiser(2)
    solver = Solver(steps=4, grid=Karras(low=0.01, high=40))
    made = pairs_of(Reflow(pairs=20, solver=solver, guidance=0.5), teacher)
    assert {name: len(column) for name, column in made.items()} == dict.fromkeys(made, 20)
    assert torch.equal(made["labels"], torch.arange(20) % 12 % 3)
    assert torch.equal(made["index"], torch.arange(20))
    sampler = ODE(tuple(karras_ratios(4, 0.01, 40)), guidance=0.5)
    expected = sampler(teacher, Draws(torch.arange(20), 3, PREPARATION), {"labels": made["labels"]})
    torch.testing.assert_close(made["samples"], expected, rtol=1e-4, atol=1e-5)


def test_pairs_do_not_depend_on_how_they_were_batched() -> None:
    teacher, method = mixture(), Reflow(solver=Solver(steps=3))
    one, other = (method.prepare(context(teacher, batch_size=size)).columns for size in (12, 5))
    assert torch.equal(one["noise"], other["noise"])
    torch.testing.assert_close(one["samples"], other["samples"])


def test_rows_without_classes_make_pairs_without_classes() -> None:
    given = Preparation({"teacher": mixture()}, rows(4, classes=0), stacked, 3, torch.device("cpu"), 4)
    assert set(Reflow().prepare(given).columns) == {"noise", "samples", "index"}


def test_a_flow_to_one_point_is_straight_and_one_to_two_is_not() -> None:
    noise = torch.randn(64, 2)
    point = MixtureDenoiser(torch.tensor([[1.0, 2.0]]), 1e-6, torch.ones(1))
    assert straightness(point, noise, None, 16).max() < 1e-6
    assert straightness(mixture(), noise, None, 16).mean() > 0.05


def test_straightness_of_a_gaussian_is_the_integral_in_closed_form() -> None:
    """x_t = (1 - t) m + f(t) z with f^2 = (1 - t)^2 s^2 + t^2, so S = var_t(f') E z^2."""
    s, noise = 0.5, torch.randn(4000, 1, dtype=torch.float64)
    gaussian = MixtureDenoiser(torch.zeros(1, 1, dtype=torch.float64), s, torch.ones(1, dtype=torch.float64))
    last = times_of(gaussian, noise)[1]
    t = torch.linspace(0, 1, 20001, dtype=torch.float64) * last
    f = ((1 - t).square() * s**2 + t.square()).sqrt()
    slope = f.diff() / t.diff()
    ours = straightness(gaussian, noise, None, 500).mean()
    assert ours.item() == pytest.approx((slope.var() * noise.square().mean()).item(), rel=0.02)


def test_one_step_is_trained_at_the_input_that_the_sampler_gives() -> None:
    student, batch = denoiser(1), batch_of()
    draws, condition = Draws(batch["index"], 3, 0), {"labels": batch["labels"]}
    written = StraightSteps(1)(student, draws, condition)
    pair = {**batch, "noise": draws.normal("written 0", (2,)), "samples": written}
    terms = Reflow(target="one_step").losses({"student": student}, pair, frozenset({"student"}), STEP)
    assert terms.terms["pairs"].sum < 1e-9


def test_many_straight_steps_follow_the_same_flow_as_the_solver() -> None:
    noise = Draws(torch.arange(32), 0, 0).normal("written 0", (2,))
    teacher = mixture(0.3)
    fine = Solver(steps=200, grid=Karras(low=0.002))(lambda x, level: teacher(x, level), noise, teacher.form)
    torch.testing.assert_close(
        StraightSteps(800)(teacher, Draws(torch.arange(32), 0, 0), None), fine, rtol=0.02, atol=0.02
    )


def test_only_the_student_receives_gradients() -> None:
    student, teacher = denoiser(1), denoiser(2)
    batch = batch_of()
    noise, samples = Reflow().pair({"teacher": teacher}, Draws(batch["index"], 3, 0), {"labels": batch["labels"]})
    assert not samples.requires_grad
    nets = {"student": student, "teacher": teacher}
    terms = Reflow().losses(nets, {**batch, "noise": noise, "samples": samples}, frozenset({"student"}), STEP)
    terms.terms["pairs"].sum.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters()) > 8


def test_the_pseudo_huber_distance_is_a_square_near_zero_and_a_length_far_away() -> None:
    small, large = torch.full((1, 4), 1e-6), torch.full((1, 4), 100.0)
    assert distance(small, "pseudo_huber").item() == pytest.approx(1e-12 / (2 * 0.00054), rel=0.2)
    assert distance(large, "pseudo_huber").item() == pytest.approx(100, rel=1e-4)


def test_a_run_resumed_on_its_pairs_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch) -> None:
    def begun(folder: Path, **options):
        method = Reflow(pairs=10, solver=Solver(steps=2), ema=0.9)
        return run(folder, method, denoiser(1), denoiser(2), rows(), save_steps=3, save_strategy="steps", **options)

    whole = begun(tmp_path / "run")
    whole.train()
    resumed = begun(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Reflow, "pair", None)  # they are read
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert equal(weights(whole.student), weights(resumed.student))
    assert equal(weights(whole.exported), weights(resumed.exported))
    shutil.rmtree(tmp_path / "run" / "prepared")
    again = begun(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert equal(weights(whole.student), weights(again.student))


def test_reflow_straightens_a_flow_and_evaluation_says_so(tmp_path: Path) -> None:
    student = denoiser(1, classes=0, sigma_data=1.0)
    method = Reflow(pairs=256, solver=Solver(steps=8, grid=Karras(low=0.02, high=20)))
    plain = rows(8, classes=0)
    trainer = run(
        tmp_path, method, student, mixture(), plain, max_steps=300, per_device_train_batch_size=64, learning_rate=5e-3
    )
    trainer.eval_dataset = rows(64, classes=0)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.3 * before["eval_loss"]
    assert after["eval_straightness_ratio"] < 0.5
    assert after["eval_teacher_straightness"] == before["eval_teacher_straightness"]
    written = trainer.sample(64)
    nearest = torch.cdist(written, torch.tensor([[1.0, 0.0], [-1.0, 0.5]])).min(1).values
    assert (nearest < 0.5).float().mean() > 0.7


def test_level_of_pure_noise_is_asked_where_the_students_own_form_ends() -> None:
    first, last = times_of(denoiser(), torch.zeros(1))
    assert first.item() == pytest.approx(0.002 / 1.002) and last.item() == pytest.approx(80 / 81)
    level = FlowMatching().level(last[None])
    assert isinstance(level, Level) and level.ratio.item() == pytest.approx(80, rel=1e-4)


def test_a_student_of_one_step_is_not_asked_for_its_path(tmp_path: Path) -> None:
    trainer = run(tmp_path, Reflow(target="one_step", solver=Solver(steps=2)), denoiser(1), denoiser(2), rows())
    assert not any("straightness" in name for name in trainer.evaluate())
