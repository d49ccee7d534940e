"""What `kdlm compare` reads: every mistake of every recipe is said before anything runs."""

from pathlib import Path

import pytest
from small_comparison import PLAIN, comparison

from kdlm.cli import main
from kdlm.compare import compare
from kdlm.compare.planned import planned
from kdlm.recipe import resolved
from kdlm.yaml_document import RecipeError


def test_every_mistake_of_every_recipe_is_said_with_its_run_and_nothing_is_run(tmp_path: Path) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    runs = {
        "good": {"recipe": recipe},
        "unknown": {"recipe": recipe, "overrides": ["losses.0.temprature=2"]},
        "lacking": {"recipe": recipe, "overrides": ["teacher="]},
        "gone": {"recipe": str(tmp_path / "gone.yaml")},
    }
    compared = comparison(tmp_path, runs=runs)
    with pytest.raises(ValueError, match="unknown key") as caught:
        compare(compared)
    said = str(caught.value)
    assert "unknown: override 'losses.0.temprature=2': unknown key, did you mean temperature?" in said
    assert "lacking: teacher: missing" in said and "gone: " in said and "good: " not in said
    assert not compared.output.exists()


def test_seeds_reach_the_recipe_and_the_weights_a_student_begins_with(tmp_path: Path) -> None:
    runs = planned(comparison(tmp_path, seeds=[5, 7]))
    assert [(run.recipe.seed, run.recipe.student.seed, run.folder.name) for run in runs] == [
        (5, 5, "kd-5"),
        (7, 7, "kd-7"),
    ]


def test_overrides_of_all_come_before_those_of_a_run(tmp_path: Path) -> None:
    runs = {
        name: {"recipe": str(tmp_path / "recipe.yaml"), "overrides": own} for name, own in (("a", []), ("b", PLAIN))
    }
    runs["b"]["overrides"] = [*PLAIN, "training.max_steps=9"]
    found = planned(comparison(tmp_path, runs=runs, overrides=["training.max_steps=7"]))
    assert [run.recipe.training.max_steps for run in found] == [7, 9]


def test_the_folder_of_another_run_is_refused_and_what_changed_is_said(tmp_path: Path) -> None:
    compared = comparison(tmp_path)
    (run,) = planned(compared)
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(resolved(run.recipe).replace("learning_rate: 0.01", "learning_rate: 0.5"))
    with pytest.raises(ValueError, match=r"kd-3 holds a run of another recipe \(training.learning_rate: 0.5 -> 0.01\)"):
        compare(compared)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "ce"}, "baseline: no run is called 'ce'. There are: kd"),
        ({"runs": {}}, "nothing to run"),
        ({"seeds": [1, 1]}, "seeds: each may be there once"),
        ({"runs": {"a/b": {"recipe": "r.yaml"}}}, "runs: 'a/b' is no name of a folder"),
        ({"metrics": {"eval_loss": "down"}}, "lower"),
        ({"runs": {"a": {"recpe": "r.yaml"}}}, "runs.a.recpe: unknown key, did you mean recipe?"),
        ({"search": {"recipe": "r", "space": {"seed": {"low": 2, "high": 1}}}}, "low must be below high"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused_in_words(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        comparison(tmp_path, **changes)


def test_the_command_says_the_line_of_the_file_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    comparison(tmp_path)
    file = tmp_path / "comparison.yaml"
    file.write_text(file.read_text() + "worker: 2\n")
    assert main(["compare", str(file)]) == 2
    assert "worker: unknown key, did you mean workers?" in capsys.readouterr().err
