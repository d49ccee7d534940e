"""Students that are pruned by measurement, in a run: staged, resumed, checked before there is anything."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from kdlm import cli
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.train import train

COMMON = """
data:
  train: [{path: "sandbox:arithmetic/train", limit: 12, columns: {prompt: prompt, completion: completion}}]
  max_length: 96
  eval_rows: 2
method: {name: logit_kd}
losses: [{name: forward_kl}]
training:
  {max_steps: 4, per_device_train_batch_size: 2, learning_rate: 0.01, save_steps: 2, logging_steps: 2, use_cpu: true}
"""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    folder = tmp_path / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(build("code-tokenizer-tiny", progress=None))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = OlmoeConfig(vocab_size=len(tokenizer), **sizes, **special, num_experts=4, num_experts_per_tok=2)
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def staged(folder: Path, mixture: Path) -> Path:
    stages = []
    for name, source, size in (("half", str(mixture), 16), ("quarter", "stage:half", 8)):
        student = {
            "name": "pruned",
            "source": {"name": "pretrained", "path": source},
            "width": {"intermediate_size": size},
            "rows": 2,
            "router_balance": 0.01,
        }
        (folder / f"{name}.yaml").write_text(
            f"student: {json.dumps(student)}\nteacher: {{name: local, path: {mixture}}}{COMMON}run_dir: unused\n"
        )
        stages.append(f"  - {{name: {name}, recipe: {name}.yaml}}\n")
    path = folder / "stages.yaml"
    path.write_text(f"run_dir: {folder / 'run'}\nstages:\n{''.join(stages)}")
    return path


def test_experts_are_slimmed_in_two_stages_as_wide_as_in_one(mixture, tmp_path, capsys):
    path = staged(tmp_path, mixture)
    assert cli.main(["check", str(path)]) == 0
    assert cli.main(["train", str(path)]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run/quarter/student")
    assert [student.config.intermediate_size, student.config.num_experts] == [8, 4]
    for layer in student.model.layers:
        assert layer.mlp.experts.down_proj.shape == (4, 32, 8)
    logged = [json.loads(line) for line in (tmp_path / "run/half/metrics.jsonl").read_text().splitlines()]
    assert any("router_balance" in line and line["expert_load"] >= 1 for line in logged)


@pytest.mark.parametrize("what", ["block", "experts"])
def test_a_pruned_student_resumes_to_the_weights_of_the_unbroken_run(what, mixture, tmp_path, capsys):
    path, source = tmp_path / "r.yaml", "{name: sandbox, model: code-teacher-tiny}"
    student = f"{{name: pruned, source: {source}, layers: {{drop: 1, tokens: all}}}}"
    if what == "experts":
        student = f"{{name: pruned, source: {{name: pretrained, path: {mixture}}}, width: {{intermediate_size: 8}}}}"
        source = f"{{name: local, path: {mixture}}}"
    path.write_text(f"student: {student}\nteacher: {source}{COMMON}run_dir: {tmp_path / 'run'}\n")
    run = train(load(path))
    whole = load_file(run / "student/model.safetensors")
    if what == "block":
        assert "layers 0 to 0 of 2 left out" in (said := capsys.readouterr().out) or "layers 1 to 1 of 2" in said
        assert AutoModelForCausalLM.from_pretrained(run / "student").config.num_hidden_layers == 1
    train(load(path), resume=str(run / "checkpoint-2"))
    again = load_file(run / "student/model.safetensors")
    assert all(torch.equal(weight, whole[name]) for name, weight in again.items())


def test_a_balance_of_routers_that_there_are_not_is_refused_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    student = "{name: sandbox, model: code-teacher-tiny, router_balance: 0.01}"
    path.write_text(
        f"student: {student}\nteacher: {{name: sandbox, model: code-teacher-tiny}}{COMMON}run_dir: {tmp_path}\n"
    )
    assert cli.main(["check", str(path)]) == 2
    assert "student.router_balance: the student is no mixture of experts" in capsys.readouterr().err
