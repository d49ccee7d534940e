"""Stages that follow one another: RL, verified traces and fine-tuning (Metis-RISE)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

pytest.importorskip("trl")

from kdlm import cli
from kdlm.rollouts import GenerateEngine

ROOT = Path(__file__).parents[2]
FOLDER, PIPELINES = ROOT / "recipes/sandbox/metis_rise", ROOT / "recipes/pipelines"
SHORT = [
    "training.max_steps=2", "training.per_device_train_batch_size=2", "training.save_steps=2", "training.eval_steps=2",
    "training.warmup_steps=0", "data.train.0.limit=16", "data.eval.0.limit=2", "data.max_length=96",
]  # fmt: skip
VERIFIER = "verifier={name: regex, pattern: '[aeiou]'}"  # an untrained student satisfies it now and then
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def train(name: str, *changes: str) -> int:
    return cli.main(["train", str(FOLDER / name), *SHORT, *changes])


def made(name: str, *changes: str) -> list[dict[str, Any]]:
    assert cli.main(["generate", str(PIPELINES / f"metis_{name}.yaml"), *changes]) == 0
    return pyarrow.parquet.read_table(f"runs/pipelines/metis-{name}/rows.parquet").to_pylist()


def test_the_stages_of_metis_rise_follow_one_another(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    walks = "data.train=[{path: sandbox:arithmetic/train, limit: 16}]"
    evaluated = "data.eval=[{path: sandbox:arithmetic/eval, limit: 2}]"
    student = "student.model=code-student-tiny"
    rollouts = ["rollouts.sampling.max_new_tokens=2", "rollouts.eval_prompts=2"]
    assert train("rl.yaml", student, walks, evaluated, VERIFIER, *rollouts) == 0

    generate = GenerateEngine.generate
    ended = lambda *given: [replace(one, stop="end") for one in generate(*given)]  # noqa: E731  tiny models never end
    monkeypatch.setattr(GenerateEngine, "generate", ended)
    attempts = made(
        "attempts",
        "sources=[{path: sandbox:arithmetic/train, limit: 16, columns: {prompt: prompt}}]",
        "steps.0.sampling.max_new_tokens=2",
        "steps.1.verifier={name: regex, pattern: '[ae]'}",
    )
    assert len({row["prompt"] for row in attempts}) == 16 and len(attempts) == 128
    own = made("own")
    expert = made(
        "expert",
        "writers.expert.path=sandbox:code-teacher-tiny",
        "steps.1.sampling.max_new_tokens=2",
        "steps.2.verifier={name: regex, pattern: '.'}",
    )
    rates = {row["prompt"]: (row["solved"], row["attempts"]) for row in attempts}
    assert own and all(0 < rates[row["prompt"]][0] < 8 for row in own)
    assert len({(row["prompt"], row["completion"]) for row in own}) == len(own)
    assert max(sum(row["prompt"] == prompt for row in own) for prompt in rates) <= 4
    assert all(rates[row["prompt"]] == (0, 8) for row in expert)
    assert all(set(row["completion"]) & set("ae") for row in own)
    assert 0 < len(expert) <= sum(rate == (0, 8) for rate in rates.values())
    assert train("sft.yaml", evaluated) == 0
    assert json.loads(Path("runs/sandbox-metis-sft/results.json").read_text())["steps"] == 2
