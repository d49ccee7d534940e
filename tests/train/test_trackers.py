"""What tensorboard and trackio are shown of a run: its scalars, and in the end its figures, without a network."""

import json
from io import BytesIO
from pathlib import Path

import pytest

from kdlm.recipe import load
from kdlm.train import assemble, train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 1}
method: {name: hidden_kd, layers: [[0, 1]]}
losses: [{name: forward_kl}]
evaluation: {rows: 8, measures: [reverse_kl_to_teacher]}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1,
           eval_strategy: steps, eval_steps: 2, save_strategy: "no", use_cpu: true}
run_dir: {RUN}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{RUN}", str(tmp_path / "run")))
    return path


def drawn(run: Path) -> dict[str, bytes]:
    """Stand in for the figures of a report: one, drawn of a finished run."""
    image = pytest.importorskip("PIL.Image")
    assert (run / "results.json").is_file() and (run / "student").is_dir()
    buffer = BytesIO()
    image.new("RGB", (6, 4), (250, 120, 10)).save(buffer, "PNG")
    return {"loss curves": buffer.getvalue()}


def logged(run: Path) -> dict[str, float]:
    """The last value of each number that the run wrote down, by the names that transformers gives it in trackers."""
    last = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            last[name if name != "step" else "global_step"] = value
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in last.items()}


def test_tensorboard_has_every_number_of_the_log_and_the_figures(recipe: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(load(recipe, ["training.report_to=tensorboard"]), figures=drawn)
    folder = next(run.rglob("events.out.tfevents.*")).parent
    seen = EventAccumulator(str(folder), size_guidance={"images": 0})
    seen.Reload()
    numbers = logged(run)
    assert {"train/memory_gib", "train/tokens_per_second", "train/forward_kl", "eval/reverse_kl_to_teacher"} <= set(
        numbers
    )
    assert any(name.count("/") > 1 for name in numbers), "names with a slash of their own"
    for name in set(numbers) - {"train/global_step"}:
        assert seen.Scalars(name)[-1].value == pytest.approx(numbers[name], rel=1e-5), name
    (picture,) = seen.Images("figures/loss curves")
    assert (picture.width, picture.height, picture.step) == (6, 4, 2)


def test_trackio_has_every_number_of_the_log_and_the_figures(recipe: Path) -> None:
    pytest.importorskip("trackio")  # it writes where tests/conftest.py says
    from trackio.sqlite_storage import SQLiteStorage

    settings = ["training.report_to=trackio", "training.project=kdlm-test", "training.run_name=one"]
    run = train(load(recipe, settings), figures=drawn)
    assert SQLiteStorage.get_runs("kdlm-test") == ["one"]
    lines = SQLiteStorage.get_logs("kdlm-test", "one")
    seen = {name: value for line in lines for name, value in line.items()}
    whole = ("train/train_", "train/total_flos", "train/global_step")  # of a whole run, which trackio is not told
    for name, value in logged(run).items():
        assert name.startswith(whole) or seen[name] == pytest.approx(value), name
    assert seen["figures/loss curves"]["_type"] == "trackio.image"


def test_nothing_is_drawn_for_a_run_that_reports_to_neither(recipe: Path) -> None:
    def never(run: Path) -> dict[str, bytes]:
        raise AssertionError("drawn for nobody")

    train(load(recipe), figures=never)


def test_runs_of_one_name_in_two_folders_are_two_runs_to_a_tracker(recipe: Path, tmp_path: Path) -> None:
    names = {assemble(load(recipe, [f"run_dir={tmp_path / of / 'run'}"])).trainer.args.run_name for of in ("a", "b")}
    assert len(names) == 2 and not any("/" in name for name in names)
