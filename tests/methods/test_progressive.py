"""Progressive distillation: two steps of the teacher land where one of the student shall, on one grid in all phases."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_denoisers import batch_of, denoiser, equal, mixture, rows, run, weights

from kdlm.diffusion import Draws, FlowMatching, Karras, Level, TrigFlow, UniformTime, moved
from kdlm.diffusion.level import over
from kdlm.methods import Progressive, SnapshotOf, Step
from kdlm.methods.diffusion.progressive import GridSteps, two_steps
from kdlm.networks import role_plan

CLEAN = Level(torch.ones(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64))


def levels(form, times: tuple[float, ...]) -> list[Level]:
    return [form.level(torch.full((16,), time, dtype=torch.float64)) for time in times]


PATHS = {
    "flow": levels(FlowMatching(), (0.9, 0.5, 0.2)),
    "flow from pure noise": levels(FlowMatching(), (1.0, 0.5, 0.2)),
    "trig": levels(TrigFlow(), (1.5, 0.8, 0.1)),
    "exploding": [Level(torch.ones(16).double(), torch.full((16,), r).double()) for r in (80.0, 9.0, 0.4)],
    "to the clean sample": [*levels(FlowMatching(), (0.4, 0.1)), CLEAN],
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_one_step_with_the_target_lands_where_two_of_the_teacher_do(path: list[Level]) -> None:
    at, half, to = path
    teacher, noised = denoiser(1, classes=0).double(), torch.randn(16, 2, dtype=torch.float64)
    predict = lambda x, level: teacher(x, level)  # noqa: E731
    if bool((at.alpha == 0).all()):  # this one's own form does not reach pure noise
        predict = lambda x, level: torch.tanh(x + over(level.angle, x))  # noqa: E731
    there = moved(noised, predict(noised, at), at, half)
    landed = moved(there, predict(there, half), half, to)
    target = two_steps(predict, noised, at, half, to)
    torch.testing.assert_close(moved(noised, target, at, to), landed, rtol=1e-6, atol=1e-9)
    share = over(to.sigma / at.sigma, noised)  # the paper's form
    paper = (landed - share * noised) / (over(to.alpha, noised) - share * over(at.alpha, noised))
    torch.testing.assert_close(target, paper, rtol=1e-6, atol=1e-9)


def test_in_float32_the_target_keeps_its_digits_where_the_papers_form_loses_them() -> None:
    at, half, to = (Level(torch.ones(16), torch.full((16,), r)) for r in (80.0, 79.9, 79.8))
    target = two_steps(lambda x, level: torch.ones_like(x), 80 * torch.randn(16, 2), at, half, to)
    torch.testing.assert_close(target, torch.ones(16, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", [Karras(), UniformTime(low=0.0, high=1.0)], ids=["karras", "uniform"])
def test_steps_of_all_phases_lie_on_the_first_grid_and_join_end_to_end(grid) -> None:
    method = Progressive(start=8, end=1, phase_steps=1, grid=grid)
    like, student = torch.zeros(256, 2), denoiser()
    draws = Draws(torch.arange(256), 0, 0)
    seen = {}
    for phase in range(3):
        at, half, to = method.interval(student, like, draws, phase)
        seen[phase] = {tuple(row) for row in torch.stack([at.ratio, half.ratio, to.ratio], 1).tolist()}
        assert len(seen[phase]) == 4 >> phase
        steps = sorted(seen[phase], reverse=True)
        assert all(before[2] == after[0] for before, after in pairwise(steps))
        assert steps[0][0] == method.interval(student, like, draws, 0)[0].ratio.max() and steps[-1][2] == 0
    for fine, coarse in ((0, 1), (1, 2)):
        halves = {(one[0], one[2]) for one in seen[fine]}  # the teacher's steps are the student's of before
        assert {step for at, half, to in seen[coarse] for step in ((at, half), (half, to))} == halves


def test_a_phase_ends_with_the_student_as_the_next_ones_teacher() -> None:
    method = Progressive(start=8, end=2, phase_steps=3)
    assert [method.phase(done) for done in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [done for done in range(12) if method.begins(done)] == [3]
    assert role_plan(method, 6)[-1] == "previous: copy of student, taken after step 3"
    averaged = Progressive(start=8, end=2, phase_steps=3, ema=0.9).roles["previous"]
    assert isinstance(averaged, SnapshotOf) and averaged.role == "average"


def test_the_first_phase_asks_the_guided_teacher_and_the_later_ones_the_copy() -> None:
    batch, student = batch_of(), denoiser(1)
    silent = {"student": student, "teacher": None, "previous": denoiser(2)}
    method = Progressive(start=8, end=2, phase_steps=3, guidance=1.0)
    assert method.losses(silent, batch, frozenset({"student"}), Step(3, 6)).terms["step"].sum > 0
    first = {"student": student, "teacher": denoiser(3), "previous": None}
    method.losses(first, batch, frozenset({"student"}), Step(2, 6)).terms["step"].sum.backward()
    assert all(p.grad is None for p in first["teacher"].parameters())
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())


def test_a_student_that_lands_there_has_loss_zero() -> None:
    batch = batch_of(classes=0)
    method = Progressive(start=4, end=1, phase_steps=1)

    def teacher(noised, level, condition):
        return torch.tanh(noised)

    class Lands:
        form = denoiser().form

        def __call__(self, noised, at, condition):
            _, half, to = method.interval(self, noised, Draws(batch["index"], 0, 0), 0)
            return two_steps(lambda x, level: teacher(x, level, None), noised, at, half, to)

    nets = {"student": Lands(), "teacher": teacher}
    assert method.losses(nets, batch, frozenset(), Step(0, 2)).terms["step"].sum == 0


@pytest.mark.parametrize(("start", "end"), [(6, 4), (8, 3), (4, 4), (2, 4)])
def test_steps_that_do_not_halve_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=r"method\.start: .* power of two"):
        Progressive(start=start, end=end, phase_steps=1)


def test_a_run_too_short_for_its_phases_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.max_steps: 2 phases .* take 20 steps, and the run has 19"):
        Progressive(start=4, end=1, phase_steps=10).losses({}, batch_of(), frozenset(), Step(0, 19))


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("step", [2, 3, 4], ids=["before the border", "at the border", "after the border"])
def test_a_run_resumed_around_a_phases_end_ends_as_an_unbroken_one(tmp_path: Path, step: int, ema) -> None:
    def begun():
        method = Progressive(start=4, end=1, phase_steps=3, ema=ema)
        return run(tmp_path, method, denoiser(1), denoiser(2), rows(), save_strategy="steps", save_steps=1)

    whole = begun()
    whole.train()
    resumed = begun()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name in ("student", "previous", *(() if ema is None else ("average",))):
        ours, theirs = weights(whole.networks.module_of(name)), weights(resumed.networks.module_of(name))
        assert equal(ours, theirs), name
    assert not equal(weights(whole.networks.module_of("previous")), weights(whole.student))


def test_the_copy_is_the_student_at_the_phases_end(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer = run(tmp_path, Progressive(start=4, end=1, phase_steps=3), denoiser(1), denoiser(2), rows(), **options)
    trainer.train()
    at_the_border = denoiser(0)
    at_the_border.load_weights(tmp_path / "checkpoint-3")
    assert equal(weights(at_the_border), weights(trainer.networks.module_of("previous")))


def test_one_step_learnt_by_halves_lands_on_the_modes(tmp_path: Path) -> None:
    """The start is a student that already knows how to denoise; two phases take it from four steps to one."""
    student = denoiser(1, classes=0, sigma_data=1.0)
    method = Progressive(start=4, end=1, phase_steps=200, grid=Karras(low=0.3, high=10))
    options = {"max_steps": 400, "per_device_train_batch_size": 64, "learning_rate": 5e-3}
    trainer = run(tmp_path, method, student, mixture(), rows(256, classes=0), **options)
    trainer.train()
    nearest = torch.cdist(trainer.sample(64), torch.tensor([[1.0, 0.0], [-1.0, 0.5]])).min(1).values
    assert (nearest < 0.5).float().mean() > 0.7
    assert isinstance(method.sampler(), GridSteps) and method.sampler().stride == 4
