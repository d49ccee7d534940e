"""The guard of the chosen side of preferences: it reads what the method measured, and stops where it turns up."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlm.check import check
from kdlm.recipe import load
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
data: {train: [{path: pairs.jsonl}], max_length: 32}
method: {name: redi, alpha: 3.0}
guards: {every: 1, chosen_nll: {stop: {above_start: 1.01}, patience: 2}}
training: {max_steps: 12, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 0.03,
  logging_steps: 1, save_strategy: "no", use_cpu: true}
run_dir: run
"""
PAIRS = [{"prompt": f"x{n} =", "chosen": f" a + b + {n}", "rejected": f" a + b + {n + 1}"} for n in range(8)]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def write(*overrides: str, **changes: Any) -> Any:
        Path("recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | changes))
        return load("recipe.yaml", overrides)

    return write


def test_a_run_whose_chosen_side_gets_less_likely_is_stopped(recipe) -> None:
    run = train(recipe())
    stopped = json.loads((run / "results.json").read_text())["stopped"]
    assert (stopped["guard"], stopped["looks"]) == ("chosen_nll", 2)
    assert not (run / "student").exists()
    said = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = {log["step"]: log["guard/chosen_nll"] for log in said if "guard/chosen_nll" in log}
    means = {log["step"]: -log["chosen_log_prob"] for log in said if "chosen_log_prob" in log}
    assert looks == pytest.approx(means, rel=1e-5)
    assert looks[stopped["step"]] > 1.01 * looks[1]


def test_it_is_refused_where_there_is_no_chosen_side(recipe) -> None:
    assert any("chosen_nll" in line for line in check(recipe()))
    one = {"path": "pairs.jsonl", "columns": {"prompt": "prompt", "completion": "chosen"}}
    with pytest.raises(ValueError, match=r"guards\.chosen_nll: the data have no chosen side"):
        check(recipe(method={"name": "sequence_kd"}, data={"train": [one]}))
