"""Distribution matching through the trainer: steps that do not depend on how they are cut, resumes that do not show."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks
from matching_runs import FIELDS, HEADS, SECTIONS, denoiser, trainer, weights
from safetensors.torch import load_file

from kdlm.methods.diffusion.adversarial import FDistillSection


@pytest.mark.parametrize("name", SECTIONS)
def test_a_step_in_two_micro_batches_is_the_step_in_one(arguments, name: str) -> None:
    ends = []
    for size, parts in ((8, 1), (4, 2)):
        run = trainer(
            arguments, SECTIONS[name].build([], None), max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        )  # fmt: skip
        before = weights(run)
        run.train()
        ends.append((weights(run), run.method.state_dict()))
    assert any((ends[0][0][key] - before[key]).abs().max() > 1e-4 for key in before if key.startswith("student"))
    for one, other in zip(*ends, strict=True):
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cadence", ["inclusive", "exclusive"])
def test_a_resume_in_the_middle_of_a_turn_leaves_no_trace(arguments, tmp_path: Path, cadence: str) -> None:
    section = FDistillSection(**FIELDS, ratio=3, cadence=cadence, discriminator=HEADS)
    options = {"max_steps": 9, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    kept = {"save_strategy": "steps", "save_steps": 5}  # step 6 is the second of the three
    whole = trainer(arguments, section.build([], None), output_dir=str(tmp_path / "whole"), **options, **kept)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-5"
    assert {file.name for file in (folder / "kdlm").iterdir()} == {
        "average.safetensors", "fake.safetensors", "discriminator.safetensors", "method_state.safetensors",
    }  # fmt: skip
    assert set(load_file(folder / "model.safetensors")) == set(denoiser(0).state_dict())
    again = trainer(arguments, section.build([], None), output_dir=str(tmp_path / "again"), **options)
    again.train(resume_from_checkpoint=str(folder))
    expected, got = weights(whole), weights(again)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    states = whole.method.state_dict(), again.method.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["ratios"], torch.ones(10))


def test_what_a_method_follows_is_not_logged_and_terms_are(arguments) -> None:
    run = trainer(arguments, SECTIONS["f_distill"].build([], None), max_steps=2)
    run.train()
    line = next(line for line in run.state.log_history if "loss" in line)
    assert {"student", "adversarial", "fake", "discriminator"} <= set(line)
    assert not any(name.startswith(("ratio", "share")) or name == "h" for name in line)


def test_evaluation_does_not_touch_the_state(arguments) -> None:
    run = trainer(arguments, SECTIONS["f_distill"].build([], None), max_steps=2)
    run.train()
    before = {key: value.clone() for key, value in run.method.state_dict().items()}
    first = run.evaluate(run.train_dataset)
    again = run.evaluate(run.train_dataset)
    assert all(torch.equal(before[key], value) for key, value in run.method.state_dict().items())
    assert first["eval_student"] == again["eval_student"]


def test_two_ranks_take_the_steps_of_one_process(arguments, tmp_path: Path) -> None:
    """Two gloo ranks of 1x4 against 1x8 here, student and critics by turns; the ratio's means are of both ranks."""
    name = "f_distill by turns"
    on_ranks(2, Path(__file__).with_name("two_ranks_matching.py"), tmp_path, name)
    run = trainer(arguments, SECTIONS[name].build([], None), max_steps=4, per_device_train_batch_size=8)
    run.train()
    here = {**weights(run), **{f"state.{key}": value for key, value in run.method.state_dict().items()}}
    there = load_file(tmp_path / "end")
    assert here.keys() == there.keys()
    for key, value in here.items():
        torch.testing.assert_close(there[key], value, rtol=1e-5, atol=1e-6)
