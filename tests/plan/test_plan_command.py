"""`kdlm plan` on the command line, and against a run that was measured."""

import json
from pathlib import Path

import pytest
import torch
from recipes_to_plan import recipe
from torch.profiler import ProfilerActivity, profile

from kdlm.cli import main
from kdlm.plan import device, predict
from kdlm.recipe import Recipe, resolved
from kdlm.train import assemble

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved(recipe(tmp_path)))
    return str(path)


def test_a_run_that_fits_is_told_by_part_with_its_pace(written, capsys):
    assert main(["plan", written, "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert "teacher weights" in said and "fits" in said
    assert "tokens/s" in said and "hours for 100 steps" in said and "assumed, not measured" in said


def test_overrides_are_planned_and_programs_get_json(written, capsys):
    assert main(["plan", written, "--gpu", "24 GiB, 100 TFLOP/s, 1000 GB/s", "--json", "data.max_length=32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["fits"] and found["memory"]["total"] == sum(found["memory"]["parts"].values())
    assert found["step"]["length"] == 32 and found["step"]["tokens"] == 4 * 32
    assert found["speed"]["hours"] > 0 and found["advice"] == []


def test_a_run_that_does_not_fit_is_told_what_to_change(written, capsys):
    changes = ["training.bf16=false", "data.max_length=512"]
    assert main(["plan", written, "--gpu", "0.53 GiB, 100 TFLOP/s, 1000 GB/s", *changes]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said and "what saves memory" in said and "data.max_length=256" in said
    assert "enough: " in said


def test_memory_alone_gives_no_pace(written, capsys):
    assert main(["plan", written, "--gpu", "24 GiB"]) == 0
    assert "rates are not known" in capsys.readouterr().out


def test_what_plan_does_not_cover_is_said(written, capsys):
    assert main(["plan", str(RECIPES / "vision" / "dkd.yaml")]) == 2
    assert "plan covers text recipes so far" in capsys.readouterr().err
    assert main(["plan", str(RECIPES / "sandbox" / "gold.yaml")]) == 2
    assert "one tokenizer" in capsys.readouterr().err
    assert main(["plan", written, "--gpu", "abacus"]) == 2
    assert "--gpu abacus: not known. One of A100" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "Tesla T4", "NVIDIA GeForce RTX 4090", "A100-SXM4-40GB"])
def test_gpus_are_known_by_the_names_that_cuda_gives_them(name):
    assert device(name).half is not None
    assert device("A100-SXM4-40GB").memory < device("A100-SXM4-80GB").memory


def test_a_prediction_is_near_what_torch_allocates_in_a_run(tmp_path):
    given = Recipe.model_validate(
        {
            "student": {"name": "sandbox", "model": "code-student-tiny"},
            "teacher": {"name": "sandbox", "model": "code-teacher-tiny"},
            "data": {"train": [{"path": "sandbox:code/train", "limit": 40}], "max_length": 128},
            "method": {"name": "logit_kd"},
            "losses": [{"name": "forward_kl"}],
            "training": {"max_steps": 2, "per_device_train_batch_size": 16, "use_cpu": True, "save_strategy": "no"},
            "run_dir": str(tmp_path),
        }
    )
    predicted = predict(given, device("cpu")).tensors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assemble(given).trainer.train()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    measured = int(torch.tensor([change for _, change in changes]).cumsum(0).max())
    assert predicted == pytest.approx(measured, rel=0.15)
