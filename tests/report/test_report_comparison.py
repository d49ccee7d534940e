"""Runs are grouped by recipe, told apart by what differs, and judged by what was measured."""

import shlex

import pytest
import yaml
from run_folders import BASELINE, RECIPE, lines, write_run

from kdlm.cli import parse
from kdlm.report.comparison import comparison, model_name, recipes
from kdlm.report.groups import differences, flat, grouped
from kdlm.report.numbers import plain, shown
from kdlm.report.reproduce import command, overrides
from kdlm.report.run import read_runs
from kdlm.report.verdict import gap_to, verdict
from kdlm.section_loader import parse_override, replaced


@pytest.fixture
def runs(tmp_path):
    """A distilled student of two seeds (2.5 and 2.7) and a baseline (3.0); the teacher has 2."""
    return read_runs(
        [
            write_run(tmp_path / "kl-seed0", lines(2.5)),
            write_run(tmp_path / "ce", lines(3.0, "cross_entropy"), **BASELINE),
            write_run(
                tmp_path / "kl-seed1", lines(2.7), seed=1, training=RECIPE["training"] | {"report_to": "trackio"}
            ),
        ]
    )


def test_seeds_of_one_recipe_are_one_group(runs):
    groups = grouped(runs)
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("kl", ["kl-seed0", "kl-seed1"]),
        ("ce", ["ce"]),
    ]
    found = groups[0].final("cross_entropy")
    assert found.value == pytest.approx(2.6) and found.error == pytest.approx(0.1) and found.freedom == 1


def test_runs_on_other_data_are_no_group_and_are_not_compared(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    text = (other / "data.json").read_text()
    (other / "data.json").write_text(text.replace('"eval": "b"', '"eval": "c"'))
    groups = grouped(read_runs([one, other]))
    assert len(groups) == 2
    assert verdict(groups) == (
        "The runs were evaluated on different data, so their figures are not set against each other."
    )
    assert "<b>" not in comparison(groups) and "not evaluated on the same data" in comparison(groups)


def test_the_verdict_measures_against_the_student_of_the_data_alone(runs):
    groups = grouped(runs)
    gap = gap_to(groups[0], groups[1])
    assert gap.value == pytest.approx((0.5 + 0.3) / 2)  # of 3.0 to 2.0: 0.5 and 0.3 closed
    low, high = gap.interval()
    assert verdict(groups) == (
        f"kl closes 40 % (95 % interval over 2 seeds: −{-100 * low:.0f} % to {100 * high:.0f} %) of the gap in "  # noqa: RUF001
        "held-out loss between ce (3) and the teacher (2)."
    )


def test_a_student_that_lost_is_not_praised(tmp_path):
    worse = write_run(tmp_path / "kl", lines(3.5))
    plain_one = write_run(tmp_path / "ce", lines(3.0, "cross_entropy"), **BASELINE)
    said = verdict(grouped(read_runs([worse, plain_one])))
    assert said.startswith("No distilled student beats the one trained on the data alone: kl closes −50 %")  # noqa: RUF001


def test_a_single_run_is_measured_against_its_start(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "kl")])
    assert verdict(grouped([run])) == (
        "kl ends with a held-out loss of 2.500 nats; its teacher has 2, and it began at 4.500: 80 % of the way."
    )


def test_a_run_without_evaluation_or_without_text_has_a_verdict_too(tmp_path):
    bare = [{key: value for key, value in line.items() if not key.startswith("eval_")} for line in lines()]
    images = [{"step": 5, "loss": 1.0, "images_per_second": 10.0}, {"step": 5, "eval_accuracy": 0.75}]
    (none,) = read_runs([write_run(tmp_path / "bare", bare)])
    (vision,) = read_runs([write_run(tmp_path / "vision", images, teacher=None)])
    assert verdict(grouped([none])) == "Nothing was evaluated yet, or the recipe has no held-out data."
    assert verdict(grouped([vision])) == "vision reaches 75.0 % accuracy on held-out data."


def test_the_table_has_means_with_intervals_the_best_in_bold_and_the_teacher(runs):
    text = comparison(grouped(runs))
    reach = 12.706 * 0.1  # Student's t with one degree of freedom
    assert f'<td class="best"><b>2.600<small> ± {reach:.3f}</small></b></td>' in text
    assert "The baseline has one seed" in text
    assert "<td>baseline</td>" in text and "<td>0:01:01</td>" in text and "<td>≈ 4,950</td>" in text
    assert '<span class="quiet">teacher</span></th><td>2</td>' in text


def test_only_keys_that_differ_are_shown(runs):
    differ = differences([group.runs[0].recipe for group in grouped(runs)])
    assert differ == {
        "method.name": ["logit_kd", "sequence_kd"],
        "losses.0.name": ["forward_kl", "cross_entropy"],
    }
    assert "method.name" in recipes(grouped(runs)) and "seed" not in differ


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 3, "run_dir": "runs/o'brien and son"},
        {"losses": [{"name": "jsd", "beta": 0.5}, {"name": "cross_entropy", "weight": 0.1}]},
        {"method": {"name": "taid", "start": 0.4}, "losses": []},
        {"training": {"max_steps": 40, "learning_rate": 1e-4}},
        {"training": {"max_steps": 40}},
        {"teacher": None, "rollouts": {"max_new_tokens": 4}},
        {"data": {"name": "text", "train": [{"path": "a: b, [c] # 'd' \"e\" é"}], "loss_on": "no"}},
    ],
)
def test_a_command_makes_the_recipe_of_its_run(tmp_path, changed):
    first, run = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", **changed)])
    words = shlex.split(command(run, first))
    made = first.recipe
    for word in parse(words[1:]).overrides:
        made, _ = replaced(made, *parse_override(word))
    assert words[:3] == ["kdlm", "train", "recipe.yaml"]
    assert {key: value for key, value in made.items() if value is not None} == {
        key: value for key, value in run.recipe.items() if value is not None
    }


def test_overrides_of_the_same_recipe_are_none():
    assert overrides(RECIPE, yaml.safe_load(yaml.safe_dump(RECIPE))) == []


def test_flat_keys_are_those_of_an_override():
    assert flat({"a": [{"b": 1}], "c": {}, "d": []}) == {"a.0.b": 1, "c": {}, "d": []}


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"name": "sandbox", "model": "code-student"}, "code-student"),
        ({"name": "pretrained", "path": "org/model"}, "org/model"),
        ({"name": "pretrained", "path": "/home/someone/models/small"}, "small"),
        ({"name": "ensemble", "members": [{"path": "a"}, {"path": "b"}]}, "a + b"),
        ({"name": "fresh", "config_from": "org/model", "seed": 1}, "org/model"),
        (None, "no teacher"),
        ({"name": "odd"}, "odd"),
    ],
)
def test_models_are_called_by_their_names(section, name):
    assert model_name(section) == name


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (2.0, "2"),
        (2.34567, "2.346"),
        (23.4567, "23.46"),
        (234.567, "234.6"),
        (59899, "59,899"),
        (1e-5, "1.00e-05"),
    ],
)
def test_numbers_have_four_digits(value, said):
    assert plain(value) == said


def test_what_is_no_number_is_said():
    assert shown(None) == "–"  # noqa: RUF001
    assert shown(float("nan")) == "not finite"
    assert shown(0.256, "top1_agreement") == "25.6"
