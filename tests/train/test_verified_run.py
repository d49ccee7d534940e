"""A run whose completions are judged: the score is in the log, and a bad verifier costs time and nothing else."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdlm.check import check
from kdlm.recipe import load
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
method: {name: gkd, student_share: 1.0}
losses: [{name: reverse_kl}]
rollouts: {sampling: {max_new_tokens: 6}, eval_prompts: 4, show: 1}
training: {max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: "no", use_cpu: true}
"""
VERIFIER = """
import time


def right(completion, reference, row):
    return reference == "3"


def stuck(completion, reference, row):
    if reference == "3":
        time.sleep(60)
    raise KeyError("no such thing")
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_verifier.py").write_text(VERIFIER)
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1), "answer": n + 1} for n in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(verifier: Any, **changes: Any) -> Any:
        data = {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "rows.jsonl"}]}
        content = yaml.safe_load(RECIPE) | {"data": data, "verifier": verifier, "run_dir": "run"} | changes
        Path("recipe.yaml").write_text(yaml.safe_dump(content))
        return load("recipe.yaml")

    return write


def logs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_score_of_each_completion_is_in_the_log_the_evaluation_and_the_samples(recipe) -> None:
    folder = train(recipe({"name": "custom", "target": "my_verifier:right"}))
    assert [log["rollout/reward"] for log in logs(folder) if "rollout/reward" in log] == [0.5, 0.5]
    assert json.loads((folder / "results.json").read_text())["eval_rollout_reward"] == 0.5
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["reward"] for sample in samples} <= {0.0, 1.0}
    assert len(samples) == 2 and all(len(one["divergence"]) == len(one["tokens"]) for one in samples)
    page = (folder / "samples.html").read_text()
    assert page.count("<article>") == 2 and "reward" in page


def test_a_verifier_that_hangs_or_raises_is_bounded_counted_and_named(recipe, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        folder = train(recipe({"name": "custom", "target": "my_verifier:stuck", "timeout": 0.3}))
    last = [log for log in logs(folder) if "loss" in log][-1]
    assert last["rollout/verifier_raised"] == last["rollout/verifier_timed_out"] == 2
    assert last["rollout/reward"] == 0.0
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "my_verifier:stuck" in said and "KeyError" in said and "0.3" in said


@pytest.mark.parametrize(
    ("verifier", "changes", "said"),
    [
        (
            {"name": "custom", "target": "my_verifier:absent"},
            {},
            r"verifier\.target: cannot import 'my_verifier:abs",
        ),
        ({"name": "numeric", "column": "solution"}, {}, r"reference to 'solution', but its columns are"),
        (
            {"name": "numeric"},
            {"rollouts": None, "method": {"name": "logit_kd"}},
            "verifier: it judges the student",
        ),
    ],
)
def test_a_verifier_that_cannot_work_is_refused_by_check(recipe, verifier, changes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(recipe(verifier, **changes))
