"""A run folder is read in whatever state it is; what is missing is said."""

import json
import math

import pytest
from run_folders import lines, write_run

from kdlm.report.run import read_run, read_runs


def test_what_a_run_measured_is_read_by_name_and_step(tmp_path):
    run = read_run(write_run(tmp_path / "kl"))
    assert run.points("forward_kl") == [(10, 4.0), (20, 3.5), (30, 3.0), (40, 2.5)]
    assert run.points("eval_cross_entropy") == [(0, 4.5), (20, 3.5), (40, 2.5)]
    assert run.final["cross_entropy"] == 2.5
    assert (run.steps, run.seconds, run.seen, run.notes) == (40, 61.0, 0.5 * 9_900, [])
    assert "eval_runtime" not in run.readings("eval_") and "epoch" not in run.readings()


@pytest.mark.parametrize("there", [None, "empty", "file"])
def test_a_folder_that_is_no_run_is_named(tmp_path, there):
    place = tmp_path / "nothing"
    if there == "empty":
        place.mkdir()
    if there == "file":
        place.write_text("x")
    with pytest.raises(ValueError, match=r"nothing: no run: expected a folder with recipe\.yaml"):
        read_runs([place])


def test_a_run_that_only_began_has_nothing_but_notes(tmp_path):
    folder = write_run(tmp_path / "kl")
    for name in ("metrics.jsonl", "results.json", "data.json", "environment.json"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.steps, run.final, run.seconds, run.seen) == (0, {}, None, None)
    assert run.notes == ["nothing was logged yet"]


def test_a_killed_run_has_the_figures_of_its_last_evaluation(tmp_path):
    folder = write_run(tmp_path / "kl")
    (folder / "results.json").unlink()
    kept = [json.dumps(line) for line in lines() if line["step"] <= 20]
    (folder / "metrics.jsonl").write_text("\n".join([*kept, '{"step": 30, "lo']))
    run = read_run(folder)
    assert run.final["cross_entropy"] == 3.5
    assert run.steps == 20 and not run.finished
    assert run.notes == ["a line of the log was cut short", "not finished: figures are those of its last evaluation"]


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    first = [line for line in lines(9.0) if line["step"] <= 30]
    second = [line for line in lines(2.5) if line["step"] >= 20]
    run = read_run(write_run(tmp_path / "kl", [*first, *second]))
    assert [step for step, _ in run.points("loss")] == [10, 20, 30, 40]
    assert run.points("loss")[1:] == [(20, 3.5), (30, 3.0), (40, 2.5)]
    assert run.segments == 2 and run.notes == ["resumed once"]


def test_values_that_are_not_finite_are_read_as_such(tmp_path):
    log = lines()
    log[1]["loss"] = math.nan
    log[2]["loss"] = math.inf
    run = read_run(write_run(tmp_path / "kl", log))
    assert not all(math.isfinite(value) for _, value in run.points("loss"))


def test_a_file_that_is_no_json_is_a_note(tmp_path):
    folder = write_run(tmp_path / "kl")
    (folder / "data.json").write_text("{")
    (folder / "environment.json").write_text("[]")
    assert read_run(folder).notes == ["environment.json could not be read", "data.json could not be read"]


def test_runs_have_the_shortest_names_that_tell_them_apart_and_each_is_read_once(tmp_path):
    folders = [write_run(tmp_path / group / "kl") for group in ("one", "two")]
    assert [run.name for run in read_runs(folders)] == ["one/kl", "two/kl"]
    assert [run.name for run in read_runs([folders[0], folders[0] / "."])] == ["kl"]
