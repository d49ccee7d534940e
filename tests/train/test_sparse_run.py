"""A recipe with `sparsity`: what it hands out, what it goes on from, and what is refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdlm.check import check
from kdlm.recipe import load
from kdlm.sparsity.masks import follows
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-teacher-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 32, eval_rows: 2}
method: {name: squarehead}
losses: [{name: forward_kl}]
sparsity: {pattern: "2:4", schedule: {name: cubic, end: 0.7, every: 1}}
training: {max_steps: 6, per_device_train_batch_size: 2, learning_rate: 0.01, save_steps: 2, use_cpu: true}
run_dir: {RUN}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("{RUN}", str(tmp_path / "run")))
    return path


def test_the_student_is_a_plain_folder_with_the_zeros_that_sparsity_json_counts(recipe: Path, tmp_path: Path) -> None:
    assert "sparsity: 50% of all linear layers but the head, 2:4, by magnitude in each layer, cubic" in check(
        load(recipe)
    )
    run = train(load(recipe))
    about = json.loads((run / "student" / "sparsity.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    assert about["pattern"] == "2:4" and about["share"] == 0.5 and 0 < about["share_of_model"] < 0.5
    for name, share in about["layers"].items():
        weight = model.get_submodule(name).weight
        assert share == (weight == 0).float().mean().item() == 0.5 and follows(weight, 2, 4)
    assert "2:4, by magnitude" in (run / "student" / "README.md").read_text()
    shares = [
        line["sparsity"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "sparsity" in line
    ]
    assert shares == sorted(set(shares)) and shares[-1] == 0.5 and len(shares) == 4

    whole = load_file(run / "student" / "model.safetensors")
    again = train(load(recipe), resume=str(run / "checkpoint-2"))
    assert all(
        (weight == whole[name]).all() for name, weight in load_file(again / "student" / "model.safetensors").items()
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.lora={rank: 2}"], "sparsity: an adapter merged into a pruned weight fills its zeros"),
        (["privacy={noise: 1.0}", "method={name: logit_kd}"], "sparsity: which weights go is read from private rows"),
        (["method={name: sequence_kd}", "losses=[]", "teacher=null", "evaluation={best: cross_entropy}",
          "training.eval_strategy=steps", "training.eval_steps=2"], "sparsity.schedule: the best checkpoint"),
    ],
)  # fmt: skip
def test_what_would_not_be_sparse_is_refused_by_check(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(load(recipe, overrides))
