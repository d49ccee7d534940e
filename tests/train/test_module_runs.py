"""Runs of students with other modules inside, from a recipe to the folder that they leave."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdlm import cli
from kdlm.finished_run import open_run
from kdlm.jobs.models import InProcess
from kdlm.models import Replaced, adaptive_layers, replaced_layers
from kdlm.sandbox import build

FOLDER = Path(__file__).parents[2] / "recipes" / "sandbox"
SHORT = [
    "data.max_length=32", "data.train.0.limit=2", "data.eval.0.limit=1", "training.max_steps=3",
    "training.per_device_train_batch_size=2", "training.save_steps=3", "training.eval_steps=3",
    "training.warmup_steps=0", "training.use_cpu=true", "training.logging_steps=1", "teacher.model=code-teacher-tiny",
]  # fmt: skip
ADAPTIVE = "student={name: adaptive, source: {name: sandbox, model: code-teacher-tiny}}"
SOURCE = "student.source.model=code-teacher-tiny"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(verb: str, name: str, *changes: str) -> int:
    return cli.main([verb, str(FOLDER / name), *changes])


def results(name: str) -> dict[str, float]:
    return json.loads(Path(f"runs/sandbox-{name}/results.json").read_text())


def test_a_student_with_replaced_layers_is_handed_out_as_a_model_of_transformers() -> None:
    assert run("train", "replaced.yaml", *SHORT, SOURCE) == 0
    assert results("replaced")["eval_layers"] > 0
    model = AutoModelForCausalLM.from_pretrained("runs/sandbox-replaced/student")
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and replaced_layers(model.config) == [1]
    assert type(open_run(Path("runs/sandbox-replaced")).student) is type(model)


def test_sequences_are_not_laid_end_to_end_where_a_state_would_run_on(capsys) -> None:
    assert run("train", "replaced.yaml", *SHORT, SOURCE, "data.packing=padding_free") == 2
    assert "padding_free lays sequences end to end, and the student has layers" in capsys.readouterr().err
    source = {"name": "sandbox", "model": "code-teacher-tiny"}
    build("code-student-tiny")
    Replaced.model_validate({"source": source, "layers": [1]}).config().save_pretrained("hybrid")
    teacher = ["teacher={name: local, path: ./hybrid}", "student={name: sandbox, model: code-student-tiny}"]
    assert run("check", "replaced.yaml", *SHORT[:-1], *teacher, "data.packing=padding_free") == 2
    assert "padding_free lays sequences end to end, and the teacher has layers" in capsys.readouterr().err


def test_three_stages_of_acm_hand_their_student_on_with_its_gates() -> None:
    assert run("train", "acm/learners.yaml", *SHORT, SOURCE) == 0
    errors = [results("acm-learners")[f"eval_error_{n}"] for n in range(1, 5)]
    assert max(errors) == errors[0] and min(errors) >= 0  # three steps: it began with no error at all learners
    assert results("acm-learners")["eval_share"] == 1
    assert run("train", "acm/gates.yaml", *SHORT) == 0
    assert run("train", "acm/whole.yaml", *SHORT) == 0
    finished = open_run(Path("runs/sandbox-acm-whole")).student
    left = Path("runs/sandbox-acm-gates/student")
    assert len(adaptive_layers(finished)) == 2
    moved = [not torch.equal(layer.choice[2].bias, torch.eye(5)[-1]) for layer in adaptive_layers(finished).values()]
    assert all(moved)
    assert json.loads((left / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    evaluated, _ = InProcess(path="runs/sandbox-acm-whole/student", device="cpu").load("models.0")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(evaluated(ids).logits, finished(ids).logits)


@pytest.mark.parametrize(
    ("name", "student"),
    [("replaced.yaml", SOURCE), ("acm/learners.yaml", SOURCE), ("acm/whole.yaml", ADAPTIVE)],
)
def test_a_plan_follows_them(name: str, student: str, capsys) -> None:
    assert run("plan", name, *[one for one in SHORT if "use_cpu" not in one], student) == 0
    assert "GiB" in capsys.readouterr().out
