"""What a run on a denoiser shows of itself: samples, figures between two ends, pictures; and `kdlm sample`."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdlm import cli
from kdlm.quality import SamplingSection, yardstick
from kdlm.recipe import load
from kdlm.train import assemble, train

RING = Path(__file__).parents[2] / "recipes" / "diffusion" / "ring_dmd.yaml"
SHORT = ["training.max_steps=4", "training.eval_steps=4", "data.rows=600", "data.eval_rows=64", "sampling.count=200"]


def recipe(folder: Path, *more: str):
    return load(RING, [f"run_dir={folder}", *SHORT, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(recipe(tmp_path_factory.mktemp("ring") / "run"))


def test_a_run_measures_its_samples_and_draws_them(run) -> None:
    results = json.loads((run / "results.json").read_text())
    assert {"eval_good", "eval_modes", "eval_tv", "eval_fd_pixel", "eval_gap_fd_pixel"} <= results.keys()
    assert [picture.name for picture in (run / "samples").iterdir()] == ["step_4.png"]


def test_what_is_sampled_afterwards_is_what_was_measured(run, capsys) -> None:
    assert cli.main(["sample", str(RING), f"run_dir={run}", *SHORT]) == 0
    said = capsys.readouterr().out
    measured = json.loads((run / "results.json").read_text())["eval_fd_pixel"]
    assert f"fd_pixel {measured:.4g}\n" in said
    assert load_file(run / "samples.safetensors")["samples"].shape == (200, 2)
    assert (run / "samples.png").is_file()


def test_sampling_a_run_that_is_not_there_says_so(tmp_path, capsys) -> None:
    assert cli.main(["sample", str(RING), f"run_dir={tmp_path / 'none'}"]) == 2
    assert "run kdlm train first" in capsys.readouterr().err


def test_a_checkpoint_is_sampled_where_the_run_is_not_finished(tmp_path, capsys) -> None:
    run = train(recipe(tmp_path / "run", "training.save_strategy=steps", "training.save_steps=2"))
    assert cli.main(["sample", str(RING), f"run_dir={run}", *SHORT]) == 0
    before = load_file(run / "samples.safetensors")["samples"]
    os.rename(run / "student", run / "elsewhere")
    assert cli.main(["sample", str(RING), f"run_dir={run}", *SHORT]) == 0
    torch.testing.assert_close(load_file(run / "samples.safetensors")["samples"], before)


def test_samples_are_the_same_at_every_call_and_nothing_random_is_used_up(tmp_path) -> None:
    trainer = assemble(recipe(tmp_path)).trainer
    state = torch.get_rng_state()
    first, again = trainer.sample(100), trainer.sample(100)
    assert torch.equal(first, again)
    torch.testing.assert_close(trainer.sample(40), first[:40])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_ends_have_gaps_of_one_and_of_zero(tmp_path) -> None:
    trainer = assemble(recipe(tmp_path)).trainer
    trainer.figures(trainer.sample(200))
    stick = trainer.yardstick
    teacher = trainer.sample(200, sampler=trainer._flow(), of="teacher")
    start = trainer.sample(200, of="teacher")
    assert stick.figures(teacher)["gap_fd_pixel"] == pytest.approx(1)
    assert stick.figures(start)["gap_fd_pixel"] == pytest.approx(0)
    assert stick.figures(teacher)["good"] > 0.95


def test_more_samples_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.count: 1024 samples want as many rows"):
        yardstick(SamplingSection(), [{"samples": torch.zeros(2)}] * 10, lambda row: row["samples"])
