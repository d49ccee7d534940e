"""`kdlm train` and `kdlm check` with a section `privacy`."""

import json
import shutil
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from opacus.accountants import RDPAccountant
from safetensors.torch import load_file

from kdlm.check import check
from kdlm.privacy.section import PrivacySection, refused
from kdlm.recipe import load
from kdlm.train import assemble, train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 24, eval_rows: 1}
method: {name: gkd, student_share: 0.7}
losses: [{name: jsd, beta: 0.5}]
rollouts: {prompt_tokens: 6, sampling: {max_new_tokens: 8, samples_per_prompt: 2}}
privacy: {noise: 1.0, clip: 0.5}
training:
  max_steps: 12
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  logging_steps: 6
  save_steps: 5
  use_cpu: true
"""
GIVEN = {"rollouts": None, "method": {"name": "logit_kd"}}
TRAINING = yaml.safe_load(RECIPE)["training"]
DATA = yaml.safe_load(RECIPE)["data"]
WEIGHED = DATA["train"][0] | {"columns": DATA["train"][0].get("columns", {}) | {"weight": "w"}}


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(changes: dict[str, Any] | None = None, *words: str) -> Any:
        content = yaml.safe_load(RECIPE) | {"run_dir": str(tmp_path / "run")} | (changes or {})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return load(tmp_path / "recipe.yaml", words)

    return write


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [{}, GIVEN, {"rollouts": yaml.safe_load(RECIPE)["rollouts"] | {"every": 2, "asynchronous": True}}],
    ids=["on policy", "given text", "asynchronous"],
)
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_unbroken_one(recipe, tmp_path: Path, changes) -> None:
    """Without a seed in the recipe: what the noise is drawn from is in the checkpoint, and nowhere else."""
    made = recipe(changes)
    folder = train(made)
    whole, results = load_file(folder / "student" / "model.safetensors"), (folder / "results.json").read_text()
    for step in (10, 12):
        shutil.rmtree(folder / f"checkpoint-{step}")
    shutil.rmtree(folder / "student")
    train(made, resume=True)
    resumed = load_file(folder / "student" / "model.safetensors")
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert json.loads(results)["privacy"] == json.loads((folder / "results.json").read_text())["privacy"]
    assert (folder / "checkpoint-5" / "privacy.json").stat().st_mode & 0o077 == 0  # nobody else's to read
    key = json.loads((folder / "checkpoint-5" / "privacy.json").read_text())["key"]
    told = [path for path in folder.rglob("*") if path.is_file() and "checkpoint-" not in str(path)]
    assert not any(key.encode() in path.read_bytes() for path in told)


def test_epsilon_is_in_the_run_folder_the_card_and_the_log(recipe) -> None:
    words = ["training.save_strategy='no'", "training.logging_steps=4"]
    folder = train(recipe({"privacy": {"noise": 0.8, "clip": 0.5, "delta": 1e-6}}, *words))
    said = json.loads((folder / "results.json").read_text())["privacy"]
    accountant = RDPAccountant()
    accountant.history = [(0.8, 4 / said["rows"], 12)]
    assert said["epsilon"] == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-12)
    assert (
        said["steps"] == 12
        and said["delta"] == 1e-6
        and said["unit"].startswith("one training sequence (of a longer text, one of its pieces)")
    )
    card = (folder / "student" / "README.md").read_text()
    assert f"epsilon {said['epsilon']:.4g} at delta 1e-06" in card and "## Privacy" in card
    assert "train: sandbox:code/train\n" in card and "trained on" not in card  # counts have no noise on them
    logged = [line["privacy/epsilon"] for line in lines_of(folder) if "privacy/epsilon" in line]
    assert len(logged) == 3 and logged == sorted(logged) and logged[-1] == said["epsilon"]


def test_a_run_stays_below_the_epsilon_that_it_was_given(recipe) -> None:
    folder = train(recipe({"privacy": {"epsilon": 3.0}, **GIVEN}, "training.save_strategy='no'"))
    said = json.loads((folder / "results.json").read_text())["privacy"]
    assert 2.9 < said["epsilon"] <= 3.0


def test_clipping_alone_promises_nothing_and_says_so(recipe) -> None:
    folder = train(recipe({"privacy": {"noise": 0.0}, **GIVEN}, "training.max_steps=1", "training.save_strategy='no'"))
    assert json.loads((folder / "results.json").read_text())["privacy"]["epsilon"] is None
    assert "no epsilon" in (folder / "student" / "README.md").read_text()


def test_a_run_does_not_go_on_with_other_noise(recipe) -> None:
    train(recipe({"privacy": {"epsilon": 3.0}, **GIVEN}, "training.max_steps=5"))
    longer = recipe({"privacy": {"epsilon": 3.0}, **GIVEN}, "training.max_steps=10")
    with pytest.raises(ValueError, match="privacy: the run began with noise"):
        train(longer, resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": DATA | {"streaming": True, "eval_rows": None}}, r"data\.streaming: the sampling rate"),
        ({"data": DATA | {"packing": "pack"}} | GIVEN, r"data\.packing: a packed row mixes"),
        ({"data": DATA | {"eval_rows": None, "eval_fraction": 0.5}}, r"data\.eval_fraction: how many rows"),
        ({"data": DATA | {"train": [DATA["train"][0] | {"weight": 1.0}]}}, r"data\.train: weights of sources"),
        ({"data": DATA | {"train": [WEIGHED]}}, r"data\.train: columns\.weight: a unit's loss is the mean"),
        ({"rollouts": {"prompt_tokens": 6, "reuse": 2}}, r"rollouts\.reuse: each step has to draw"),
        (
            {"method": {"name": "taid"}, "rollouts": None, "losses": []},
            r"method: Taid has a state that follows the data",
        ),
        (
            {"method": {"name": "hidden_kd", "layers": [[0, 1]]}, "rollouts": None},
            r"method: HiddenKD trains several networks",
        ),
        ({"training": TRAINING | {"optim": "lomo"}}, r"training\.optim: lomo moves weights inside"),
        (
            {"training": TRAINING | {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 5}},
            r"training\.lr_scheduler_type: greedy follows",
        ),
        (
            {"training": TRAINING | {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5}},
            r"training\.load_best_model_at_end: choosing a checkpoint",
        ),
        (
            {"training": TRAINING | {"eval_strategy": "steps", "eval_steps": 5}, "evaluation": {"best": "loss"}},
            r"evaluation\.best: choosing a checkpoint",
        ),
    ],
)
def test_what_breaks_the_guarantee_is_refused_by_its_key(recipe, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(recipe(changes))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"noise": 1.0, "clip": inf}, "clip: noise is a multiple of it, and it is infinite"),
        ({"epsilon": inf}, "finite"),
        ({"noise": inf}, "finite"),
    ],
)
def test_what_is_infinite_is_no_budget(recipe, section: dict[str, float], said: str) -> None:
    assert PrivacySection(noise=0.0, clip=inf).clip == inf  # clipping nothing and promising nothing
    with pytest.raises(ValueError, match=said):
        recipe({"privacy": section})


def test_rows_that_a_resumed_run_would_draw_again_are_refused(recipe) -> None:
    run = recipe(GIVEN)
    args = run.training.build(output_dir="runs/none", ignore_data_skip=True)
    problems = list(refused(args, run.method.build(run.losses, None), None))
    assert problems == [
        "training.ignore_data_skip: a resumed run would draw the rows of earlier steps again: leave it out"
    ]


def test_a_guard_may_warn_and_not_stop(recipe) -> None:
    limit = {"below": 0.1}
    check(recipe({"guards": {"entropy": {"warn": limit}}}))
    with pytest.raises(ValueError, match=r"guards\.entropy\.stop: it ends the run by a figure"):
        check(recipe({"guards": {"entropy": {"warn": limit, "stop": limit}}}))


def test_a_row_that_is_there_twice_is_refused_before_the_first_step(recipe) -> None:
    data = DATA | {"train": [DATA["train"][0] | {"weight": 1.0}, {"path": "sandbox:code/eval", "weight": 9.0}]}
    with pytest.raises(ValueError, match=r"data\.train: a row is there more than once"):
        assemble(recipe({"data": data}))


def test_a_delta_of_one_in_the_number_of_rows_is_refused(recipe) -> None:
    with pytest.raises(ValueError, match=r"privacy\.delta: 0\.1 is not less than one in \d+ rows"):
        assemble(recipe({"privacy": {"noise": 1.0, "delta": 0.1}}))


def test_a_server_is_told_of_and_a_seed_too(recipe) -> None:
    served = {"name": "served", "url": "http://127.0.0.1:1", "of": {"name": "sandbox", "model": "code-teacher-tiny"}}
    lines = check(recipe({"teacher": served, "privacy": {"noise": 1.0, "seed": 1}}))
    assert any("privacy: note: teacher is a server" in line for line in lines)
    assert any("privacy: note: data.eval_rows: figures" in line for line in lines)
    assert any("privacy: note: privacy.seed is written in recipe.yaml" in line for line in lines)


def test_an_adapter_trains_privately_and_is_exported_merged(recipe) -> None:
    student = {"name": "sandbox", "model": "code-student-tiny", "lora": {"rank": 2}}
    folder = train(recipe({"student": student, **GIVEN}, "training.max_steps=2", "training.save_strategy='no'"))
    assert (folder / "student" / "model.safetensors").is_file()
