"""Runs of a comparison are those of `kdlm train`, whatever ran before them, was killed, or failed beside them."""

import json
import time
from pathlib import Path

import pytest
from forks import start
from safetensors.torch import load_file
from small_comparison import comparison

from kdlm.cli import main
from kdlm.compare import compare
from kdlm.compare.planned import planned
from kdlm.compare.workers import run_all
from kdlm.recipe import load
from kdlm.train import train


def weights(folder: Path) -> dict:
    return load_file(folder / "student" / "model.safetensors")


def equal(ours: dict, theirs: dict) -> bool:
    return all((ours[name] == theirs[name]).all() for name in theirs)


def wait_for(path: Path, lines: int, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < end, path
        time.sleep(0.01)


def test_the_teachers_placement_is_settled_in_a_run_as_in_one_that_stands_alone(tmp_path: Path) -> None:
    compared = comparison(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text().replace("code-teacher-tiny}", "code-teacher-tiny, placement: auto}"))
    (row,) = compare(compared)
    assert row.failed == {}
    (row,) = compare(compared)
    assert row.failed == {}
    (run,) = planned(compared)
    assert json.loads((run.folder / "environment.json").read_text())["teacher_placement"]["placement"] == "resident"


def test_a_run_has_the_weights_that_it_has_alone_and_is_not_repeated(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=[0, 1], workers=2)
    (row,) = compare(compared)
    assert row.failed == {}
    other, run = planned(compared)
    assert (run.name, run.seed) == ("kd", 1)
    alone = train(load(run.path, [*run.overrides, f"run_dir={tmp_path / 'alone'}"]))
    assert equal(weights(run.folder), weights(alone))
    assert not equal(weights(run.folder), weights(other.folder)), "the seed changed nothing"
    data = json.loads((compared.output / "results.json").read_text())
    results = json.loads((alone / "results.json").read_text())
    assert data["runs"]["kd"]["seeds"]["1"]["metrics"]["eval_kl_to_teacher"] == results["eval_kl_to_teacher"]
    assert data["runs"]["kd"]["seeds"]["1"]["seconds"]["cpu"] > 0
    written = (run.folder / "results.json").stat().st_mtime_ns
    compare(compared)
    assert (run.folder / "results.json").stat().st_mtime_ns == written
    assert json.loads((compared.output / "results.json").read_text()) == data


def test_a_run_that_fails_is_said_with_its_last_lines_and_the_others_go_on(tmp_path: Path, capsys) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    bad = ["losses=[{name: custom, target: misbehaving_loss:boom}]"]
    comparison(tmp_path, runs={"bad": {"recipe": recipe, "overrides": bad}, "kd": {"recipe": recipe}}, baseline="bad")
    assert main(["compare", str(tmp_path / "comparison.yaml")]) == 1
    assert "the loss went boom" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert list(data) == ["kd", "bad"] and "the loss went boom" in data["bad"]["seeds"]["3"]["failed"]
    assert data["kd"]["metrics"]["eval_cross_entropy"]["value"] > 0
    assert data["kd"]["against_baseline"]["eval_cross_entropy"]["difference"] is None


def test_a_run_without_the_figure_that_ranks_has_failed_and_says_what_it_has(tmp_path: Path) -> None:
    (row,) = compare(comparison(tmp_path, metrics={"eval_acuracy": "higher"}))
    assert "no eval_acuracy. It has: " in row.failed[3] and "eval_accuracy" in row.failed[3]


def test_a_killed_run_goes_on_and_ends_as_if_it_had_never_been(tmp_path: Path) -> None:
    compared = comparison(tmp_path, overrides=["training.max_steps=40"])
    (run,) = planned(compared)
    process = start("train", str(run.path), *run.overrides)
    wait_for(run.folder / "metrics.jsonl", 5)
    process.kill()
    process.join()
    assert not run.finished
    run_all([run], 1, 1, lambda *_: None)
    whole = train(load(run.path, [*run.overrides, f"run_dir={tmp_path / 'whole'}"]))
    assert "resuming at step" in (run.folder / "log.txt").read_text()
    assert equal(weights(run.folder), weights(whole))
    assert not (run.folder / "seconds.json").exists(), "nobody knows how long it took"


@pytest.mark.slow
def test_runs_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    compared = comparison(tmp_path, overrides=["training.max_steps=100000", "training.save_strategy=no"])
    (run,) = planned(compared)
    process = start("compare", str(tmp_path / "comparison.yaml"))
    wait_for(run.folder / "metrics.jsonl", 3)
    process.kill()
    process.join()
    end = time.monotonic() + 60
    before = -1
    while (size := (run.folder / "metrics.jsonl").stat().st_size) != before:
        assert time.monotonic() < end, "the run goes on without its command"
        before = size
        time.sleep(2)
