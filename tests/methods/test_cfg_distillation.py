"""Guidance distillation: the guided teacher's two answers become one of the student."""

from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from small_denoisers import batch_of, denoiser, equal, rows, run, weights
from torch import nn

from kdlm.data import stacked
from kdlm.diffusion import Draws, Karras, Level, Solver, guided, load_denoiser
from kdlm.methods import GuidanceDistillation, Preparation, Step
from kdlm.methods.diffusion.cfg_distillation import guidance_residual
from kdlm.models import DenoiserStudent, Lora, adapt, merge
from kdlm.models.denoisers import train_only

STEP = Step(0, 10, seed=3)
PATHS = Solver(steps=3, grid=Karras(low=0.05, high=20))


def nets(student=None) -> dict:
    teacher = denoiser(1).requires_grad_(False).eval()
    return {"teacher": teacher, "student": denoiser(1).with_guidance() if student is None else student}


def loss_of(method: GuidanceDistillation, networks: dict, batch: dict) -> torch.Tensor:
    return method.losses(networks, batch, frozenset({"student"}), STEP).terms["guidance"].sum


def test_the_first_loss_is_the_weighted_mean_square_of_what_guidance_adds() -> None:
    method, networks, batch = GuidanceDistillation(scales=(0.5, 1.5)), nets(), batch_of()
    draws = Draws(batch["index"], 3, 0)
    level, noised = method.noised(networks, batch, draws)
    condition = {"labels": batch["labels"]}
    plain = networks["teacher"](noised, level, condition)
    offset = method.drawn(draws)[:, None] * (
        plain - networks["teacher"](noised, level, {"labels": torch.full((12,), 3)})
    )
    expected = (level.ratio**-2).clamp(min=1) * offset.square().mean(1)
    torch.testing.assert_close(loss_of(method, networks, batch), expected.sum())


def test_without_guidance_the_untrained_student_is_the_teacher_bit_for_bit() -> None:
    assert loss_of(GuidanceDistillation(scales=(0.0, 0.0)), nets(), batch_of()) == 0


def test_with_uniform_weight_the_loss_is_the_plain_mean_square() -> None:
    batch, networks = batch_of(), nets()
    far = Karras(low=3, high=5)  # SNR below 1
    ours, theirs = (GuidanceDistillation(times=far, weighting=kind) for kind in ("uniform", "truncated_snr"))
    assert loss_of(ours, networks, batch) == loss_of(theirs, networks, batch)
    near = Karras(low=0.1, high=0.1001)
    ours, theirs = (GuidanceDistillation(times=near, weighting=kind) for kind in ("uniform", "truncated_snr"))
    assert (loss_of(theirs, networks, batch) / loss_of(ours, networks, batch)).item() == pytest.approx(100, rel=0.01)


def test_the_target_is_linear_in_the_scale() -> None:
    batch, networks = batch_of(double=True), {n: m.double() for n, m in nets().items()}
    level = Level(torch.ones(12).double(), torch.full((12,), 0.7).double())
    zero, one, three = (
        guided(networks["teacher"], batch["samples"], level, {"labels": batch["labels"]}, w) for w in (0.0, 1.0, 3.0)
    )
    torch.testing.assert_close(three - zero, 3 * (one - zero))


def test_only_the_student_receives_gradients() -> None:
    networks = nets()
    networks["teacher"].requires_grad_(True)
    loss_of(GuidanceDistillation(), networks, batch_of()).backward()
    assert all(p.grad is None for p in networks["teacher"].parameters())
    assert networks["student"].guidance.weight.grad.abs().sum() > 0
    assert networks["student"].enter.weight.grad.abs().sum() > 0


def test_the_residual_is_one_without_guidance_and_zero_for_the_guided_teacher() -> None:
    networks, batch = nets(), batch_of()
    level, condition = Level(torch.ones(12), torch.full((12,), 0.7)), {"labels": batch["labels"]}
    teacher = networks["teacher"]
    for student, residual in (
        (teacher, 1.0),
        (lambda *given: guided(teacher, *given, 1.5), 0.0),
        (lambda *given: guided(teacher, *given, 0.75), 0.25),
    ):
        clean = guided(teacher, batch["samples"], level, condition, 1.5)
        state = {"noised": batch["samples"], "alpha": level.alpha, "sigma": level.sigma, "clean": clean}
        error, offset = guidance_residual(student, teacher, state, condition)
        assert (error.sum() / offset.sum()).item() == pytest.approx(residual, abs=1e-5)


def test_a_student_without_the_input_learns_a_single_scale_only() -> None:
    networks = nets(denoiser(2))
    assert loss_of(GuidanceDistillation(scales=(1.0, 1.0)), networks, batch_of()) > 0
    with pytest.raises(ValueError, match=r"student: it takes no guidance scale.*student\.guided: true"):
        loss_of(GuidanceDistillation(), networks, batch_of())


def test_rows_that_are_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="data: rows say nothing of what a sample is of"):
        loss_of(GuidanceDistillation(), nets(), batch_of(classes=0))


def prepared(batch_size: int = 5) -> dict:
    method = GuidanceDistillation(states="paths", solver=PATHS, paths=7)
    given = Preparation(nets(), rows(), stacked, 3, torch.device("cpu"), batch_size)
    made = method.prepare(given)
    assert made is not None
    return made.columns


def test_paths_hold_every_state_at_which_the_solver_asks_the_guided_teacher() -> None:
    made = prepared(batch_size=7)
    assert len(made["noised"]) == 7 * (2 * PATHS.steps - 1)
    assert torch.equal(made["index"], torch.arange(35))
    assert torch.equal(made["labels"], (torch.arange(7) % 3).repeat(5))
    level = Level(made["alpha"], made["sigma"])
    teacher = nets()["teacher"]
    said = guided(teacher, made["noised"], level, {"labels": made["labels"]}, made["scale"])
    torch.testing.assert_close(said, made["clean"])
    draws = Draws(torch.arange(7), 3, -2)
    scale, condition = made["scale"][:7], {"labels": made["labels"][:7]}
    end = PATHS(lambda x, at: guided(teacher, x, at, condition, scale), draws.normal("written 0", (2,)), teacher.form)
    torch.testing.assert_close(made["clean"][-7:], end)  # the last answer is the sample


def test_paths_train_on_their_own_states_and_targets() -> None:
    networks, made = nets(), prepared()
    level = Level(made["alpha"], made["sigma"])
    said = networks["student"](made["noised"], level, {"labels": made["labels"]}, guidance=made["scale"])
    expected = level.snr.clamp(min=1) * (said - made["clean"]).square().mean(1)
    torch.testing.assert_close(loss_of(GuidanceDistillation(states="paths"), networks, made), expected.sum())


def test_evaluation_gives_the_residual_and_training_lowers_it(tmp_path: Path) -> None:
    method = GuidanceDistillation(measured=[0.5, 2.0])
    options = {"max_steps": 150, "per_device_train_batch_size": 32, "learning_rate": 5e-3}
    trainer = run(tmp_path, method, denoiser(1).with_guidance(), denoiser(1), rows(240), **options)
    assert trainer.evaluate()["eval_residual_w2"] == pytest.approx(1.0, rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_residual_w0.5"] < 0.5 and after["eval_residual_w2"] < 0.3
    written = trainer.sample(6, {"labels": torch.arange(6) % 3})
    assert written.shape == (6, 2) and bool(written.isfinite().all())


def lora_student(**options):
    torch.manual_seed(5)
    return adapt(denoiser(1).with_guidance(), Lora(rank=4, alpha=4.0, **options))


def asked(network, w: float = 1.0) -> torch.Tensor:
    batch = batch_of()
    level = Level(torch.ones(12), torch.full((12,), 0.7))
    return network(batch["samples"], level, {"labels": batch["labels"]}, guidance=torch.full((12,), w))


def test_adapters_reach_every_linear_layer_and_begin_as_the_teacher() -> None:
    student = lora_student(modules_to_save=["guidance"])
    plain = {name for name, module in denoiser(1).named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in student.named_modules() if isinstance(module, BaseTunerLayer)} == plain
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("guidance.modules_to_save") for name in trained)
    level = Level(torch.ones(12), torch.full((12,), 0.7))
    batch = batch_of()
    teacher = denoiser(1)(batch["samples"], level, {"labels": batch["labels"]})
    assert torch.equal(asked(student), teacher)


def test_an_adapter_that_is_off_leaves_the_teacher_bit_for_bit_and_merged_it_is_the_student(tmp_path: Path) -> None:
    student = lora_student()
    trainer = run(tmp_path, GuidanceDistillation(), student, denoiser(1), rows())
    untrained = asked(student)
    trainer.train()
    trained = asked(student)
    assert not torch.allclose(trained, untrained, atol=1e-3)
    layers = [module for module in student.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(asked(student), untrained)
    for layer in layers:
        layer.enable_adapters(True)
    merged = merge(student)
    torch.testing.assert_close(asked(merged), trained, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(asked(load_denoiser(tmp_path / "student")), asked(merged), rtol=0, atol=0)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_adapted_student_resumes_and_merges_with_its_guidance_input(tmp_path: Path, ema) -> None:
    def begun():
        student = lora_student(modules_to_save=["guidance"])
        method = GuidanceDistillation(states="paths", solver=PATHS, ema=ema)
        return run(tmp_path, method, student, denoiser(1), rows(), save_strategy="steps", save_steps=3)

    whole = begun()
    whole.train()
    resumed = begun()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(weights(whole.student), weights(resumed.student))
    trained = asked(whole.exported)
    merged = merge(whole.exported)
    assert set(merged.state_dict()) == set(denoiser(1).with_guidance().state_dict())
    torch.testing.assert_close(asked(merged), trained, rtol=1e-5, atol=1e-5)
    assert merged.guidance.weight.abs().sum() > 0


def test_a_student_can_train_its_guidance_input_alone(tmp_path: Path) -> None:
    student = train_only(denoiser(1).with_guidance(), ["guidance"])
    before = weights(student)
    run(tmp_path, GuidanceDistillation(), student, denoiser(1), rows()).train()
    changed = {name for name, value in weights(student).items() if not torch.equal(value, before[name])}
    assert changed == {"guidance.weight", "guidance.bias"}


def test_a_module_that_is_not_there_and_two_ways_to_choose_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student\.train_only: no module 'gidance' in the network; it has .*guidance"):
        train_only(denoiser(1).with_guidance(), ["gidance"])
    with pytest.raises(ValueError, match="leave train_only out"):
        DenoiserStudent(path="x", lora=Lora(), train_only=["guidance"])
    with pytest.raises(ValueError, match="only `merged` can be opened again"):
        DenoiserStudent(path="x", lora=Lora(export="adapter"))
