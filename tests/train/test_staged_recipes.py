"""Stages that follow one another: RL, verified traces and fine-tuning (Metis-RISE)."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from kdlm import cli
from kdlm.rollouts import GenerateEngine

ROOT = Path(__file__).parents[2]
FOLDER, TRACES = ROOT / "recipes/sandbox/metis_rise", ROOT / "examples/verified_traces.py"
SHORT = [
    "training.max_steps=2", "training.per_device_train_batch_size=2", "training.save_steps=2", "training.eval_steps=2",
    "training.warmup_steps=0", "data.train.0.limit=16", "data.eval.0.limit=2", "data.max_length=96",
]  # fmt: skip
VERIFIER = "verifier={name: regex, pattern: '[aeiou]'}"  # an untrained student satisfies it now and then
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def train(name: str, *changes: str) -> int:
    return cli.main(["train", str(FOLDER / name), *SHORT, *changes])


def test_the_stages_of_metis_rise_follow_one_another(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    walks = "data.train=[{path: sandbox:arithmetic/train, limit: 16}]"
    evaluated = "data.eval=[{path: sandbox:arithmetic/eval, limit: 2}]"
    student = "student.model=code-student-tiny"
    rollouts = ["rollouts.sampling.max_new_tokens=2", "rollouts.eval_prompts=2"]
    assert train("rl.yaml", student, walks, evaluated, VERIFIER, *rollouts) == 0

    generate = GenerateEngine.generate
    ended = lambda *given: [replace(one, stop="end") for one in generate(*given)]  # noqa: E731  tiny models never end
    monkeypatch.setattr(GenerateEngine, "generate", ended)
    script = runpy.run_path(str(TRACES))
    split: list[Any] = []
    banded = script["banded"]
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "banded", lambda *a, **k: split.append(banded(*a, **k)) or split[-1])
    command = ["verified_traces.py", "runs/sandbox-metis-rl/recipe.yaml", "--student", "runs/sandbox-metis-rl/student"]
    command += ["--expert", "sandbox:code-teacher-tiny", "--samples", "3", "--out", "runs/sandbox-metis-traces.jsonl"]
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    main()
    said = capsys.readouterr().out
    (bands,) = split
    names = [rate.band for rate in bands.rates]
    assert len(names) == 16 and all(rate.attempts == 3 for rate in bands.rates)
    assert f"{len(bands.never)} calls of the expert" in said and names.count("never") == len(bands.never) > 0
    rows = [json.loads(line) for line in Path("runs/sandbox-metis-traces.jsonl").read_text().splitlines()]
    assert {row["by"] for row in rows} >= {"student"}
    for row in rows:
        assert any(letter in "aeiou" for letter in row["completion"])
        assert (row["by"] == "expert") == (row["solved"] == 0) and row["solved"] < row["attempts"] == 3
    nobody = script["Attempts"]("sandbox:code-teacher-tiny", None, None, 0)
    assert nobody([], 1) == [] and nobody.calls == 0  # every prompt is solved now and then
    assert train("sft.yaml", evaluated) == 0
    assert json.loads(Path("runs/sandbox-metis-sft/results.json").read_text())["steps"] == 2
