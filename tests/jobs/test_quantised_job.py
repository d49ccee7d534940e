"""The job of `eval/jobs/quantised.yaml`: what a model loses when it is quantised, at tiny size."""

import json
from pathlib import Path

import pytest

from kdlm.cli import main

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

ROOT = Path(__file__).parents[2]


def test_a_model_of_fewer_bits_is_further_from_itself(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    tiny = [f"models.{name}.path=sandbox:code-teacher-tiny" for name in ("whole", "8bit", "4bit")]
    rows = ['distillation.data=[{path: "sandbox:code/eval", limit: 2}]', "distillation.max_length=64"]
    places = [f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    assert main(["eval", "eval/jobs/quantised.yaml", *tiny, *rows, *places]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["distillation"]
    eight, four = (found[name]["metrics"]["kl_to_teacher"] for name in ("8bit", "4bit"))
    assert 0 < eight["value"] < four["value"] and four["error"] > 0
    printed = capsys.readouterr().out
    assert "| KL to the teacher, nats |" in printed and "lm-evaluation-harness" not in printed  # it asked no tasks
