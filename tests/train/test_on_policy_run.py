"""`kdlm train` and `kdlm check` with a section `rollouts`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from kdlm.check import check
from kdlm.cli import main
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 4}], max_length: 24, eval_rows: 1}
method: {name: gkd, student_share: 0.7}
losses: [{name: jsd, beta: 0.5}]
rollouts: {prompt_tokens: 6, sampling: {max_new_tokens: 8}}
training:
  max_steps: 12
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  logging_steps: 1
  save_steps: 5
  use_cpu: true
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(changes: dict[str, Any] | None = None, *words: str) -> Any:
        content = yaml.safe_load(RECIPE) | {"run_dir": str(tmp_path / "run")} | (changes or {})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return load(tmp_path / "recipe.yaml", words)

    return write


@pytest.mark.parametrize(
    "rollouts", [{}, {"every": 3}, {"every": 2, "reuse": 2}, {"every": 2, "asynchronous": True}], ids=str
)
def test_a_run_that_goes_on_inside_a_round_ends_as_the_unbroken_one(recipe, tmp_path: Path, rollouts) -> None:
    made = recipe({"rollouts": yaml.safe_load(RECIPE)["rollouts"] | rollouts})
    folder = train(made)
    whole = load_file(folder / "student" / "model.safetensors")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for step in (10, 12):
        shutil.rmtree(folder / f"checkpoint-{step}")
    shutil.rmtree(folder / "student")
    train(made, resume=True)
    resumed = load_file(folder / "student" / "model.safetensors")
    assert all((whole[name] == resumed[name]).all() for name in whole)

    def lengths(written: list[str]) -> dict[int, float]:
        logs = [json.loads(line) for line in written]
        return {log["step"]: log["rollout/length"] for log in logs if "rollout/length" in log}

    assert lengths(lines) == lengths((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollouts": None}, r"rollouts: missing; gkd trains on the student's own text"),
        ({"method": {"name": "logit_kd"}}, r"rollouts: logit_kd trains on the data's text only"),
        ({"data": yaml.safe_load(RECIPE)["data"] | {"packing": "pack"}}, r"data\.packing: rows are prompts"),
        (
            {"teacher": {"name": "cached", "path": "nowhere", "of": {"name": "sandbox", "model": "code-teacher-tiny"}}},
            r"teacher: cached knows given text only",
        ),
        (
            {
                "data": {"train": [{"path": "sandbox:code/train"}], "streaming": True},
                "rollouts": {"reuse": 2, "prompt_tokens": 4},
            },
            r"rollouts\.reuse: a stream",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(recipe, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(recipe(changes))


def test_the_look_says_how_old_the_text_may_be(recipe) -> None:
    lines = check(recipe({"rollouts": {"every": 2, "asynchronous": True, "prompt_tokens": 4}}))
    assert any(line.endswith("text is at most 3 steps old") for line in lines)


def test_prompts_alone_train_a_student_on_its_own_text(recipe, tmp_path: Path) -> None:
    rows = [{"prompt": f"def f{n}(", "answer": str(n)} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": [{"path": str(tmp_path / "prompts.jsonl"), "columns": {"reference": "answer"}}]}
    made = recipe({"data": data, "method": {"name": "gkd", "student_share": 1.0}}, "training.max_steps=2")
    check(made)
    train(made)
    half = recipe({"data": data})
    with pytest.raises(ValueError, match=r"data\.train\.0: .* has prompts alone, and gkd needs answers"):
        check(half)


def test_plain_text_without_a_prompt_length_is_an_error_that_names_the_setting(recipe, capsys) -> None:
    recipe({"rollouts": {}})
    assert main(["train", str(recipe({"rollouts": {}}).run_dir.parent / "recipe.yaml")]) == 2
    assert "rollouts.prompt_tokens" in capsys.readouterr().err


def test_a_run_says_where_the_teacher_is_handed_text_of_another_form(recipe, tmp_path: Path, capsys) -> None:
    teacher = tmp_path / "teacher"
    build("code-student-tiny")  # what is not built yet is not looked at
    shutil.copytree(build("code-teacher-tiny"), teacher)
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    train(recipe({"teacher": {"name": "local", "path": str(teacher)}}, "training.max_steps=1"))
    assert "note: the student has a chat template, the teacher has a chat template" in capsys.readouterr().out
