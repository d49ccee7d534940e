"""The Recipe: every file in recipes/ loads, and what is resolved is read back as the same run."""

from pathlib import Path

import pytest

from kdlm.recipe import Recipe, RecipeError, load, resolved

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
OTHERS = (FOLDER / "pipelines", FOLDER / "accelerate")  # tests/curation and tests/trainer have these
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent not in OTHERS)
RECIPES = [path for path in FILES if "\nstages:\n" not in path.read_text()]  # tests/stages has the others

SMALL = """\
student: {name: sandbox, model: code-student-tiny, lora: {rank: 4}}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: train.jsonl}], chat_template_args: {enable_thinking: no}}
method: {name: taid, start: 0.2}
losses:
  - {name: forward_kl, weight: {name: constant, level: 0.5}}
  - {name: jsd, beta: 0.1}
training: {max_steps: 3, learning_rate: 1e-3, bf16: false}
run_dir: runs/small
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_checkout_loads(path):
    assert isinstance(load(path), Recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_points_editors_at_the_schema(path):
    first = path.read_text().splitlines()[0]
    pointer = first.removeprefix("# yaml-language-server: $schema=")
    assert pointer != first
    assert (path.parent / pointer).resolve() == ROOT / "recipes" / "schema.json"


def test_a_resolved_recipe_is_read_back_as_itself(small, tmp_path):
    recipe = load(small)
    again = tmp_path / "again.yaml"
    again.write_text(resolved(recipe))
    assert load(again) == recipe


def test_a_resolved_recipe_spells_out_defaults_but_not_those_of_transformers(small):
    text = resolved(load(small))
    assert "temperature: 1.0" in text
    assert "max_steps: 3" in text
    assert "adam_beta1" not in text
    assert "- name: forward_kl" in text


def test_overrides_reach_every_part(small):
    recipe = load(small, ["losses.1.beta=0.9", "training.max_steps=7", "seed=4", "student.lora=null"])
    assert (recipe.losses[1].beta, recipe.training.max_steps, recipe.seed) == (0.9, 7, 4)
    assert recipe.student.lora is None


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("max_steps: 3", "max_step: 3", "small.yaml:8: training.max_step: unknown key, did you mean max_steps?"),
        ("max_steps: 3", "output_dir: x", "small.yaml:8: training.output_dir: unknown key"),
        (
            "max_steps: 3",
            "lr_scheduler_type: cosin",
            "small.yaml:8: training.lr_scheduler_type: expected 'linear', 'cosine'",
        ),
        ("learning_rate: 1e-3", "learning_rate: -1", "small.yaml:8: training.learning_rate: must be greater than or"),
        ("name: jsd", "name: jds", "small.yaml:7: losses.1.name: unknown loss 'jds', did you mean jsd? One of: "),
        ("model: code-student-tiny", "model: code", "small.yaml:1: student.model: expected 'code-teacher'"),
        ("name: taid", "name: tade", "small.yaml:4: method.name: unknown method 'tade', did you mean taid? One of: "),
        ("name: constant, level: 0.5", "name: constant", None),
        ("name: constant, level: 0.5", "level: 0.5", "small.yaml:6: losses.0.weight: `name` is missing. One of: "),
        ("run_dir: runs/small", "", "small.yaml:1: run_dir: missing"),
        ("start: 0.2", "start: 0.9, end: 0.1", "small.yaml:4: method: end (0.1) must not be below start (0.9)"),
    ],
)
def test_mistakes_read_like_the_yaml(small, monkeypatch, old, new, line):
    monkeypatch.chdir(small.parent)
    small.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load("small.yaml")
    (said,) = str(caught.value).splitlines()
    assert said.startswith(line or "small.yaml:6: losses.0.weight.level: missing")
