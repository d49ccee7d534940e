"""`kdlm train` and `kdlm check` on the student's own text, with a teacher that has another tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from kdlm.check import check
from kdlm.recipe import load
from kdlm.sandbox import build
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny-unigram}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: rows.jsonl}], max_length: 96, eval_rows: 2}
method: {name: alm, student_share: 0.7}
losses: [{name: cross_entropy}]
rollouts: {every: 3, sampling: {max_new_tokens: 8}}
training:
  max_steps: 8
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  logging_steps: 1
  save_steps: 4
  use_cpu: true
"""


def chat(number: int) -> str:
    asked, said = {"role": "user", "content": "say"}, {"role": "assistant", "content": f"x = {number}"}
    return json.dumps({"messages": [asked, said]}) + "\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("code-student-tiny-unigram", "code-student-tiny", "code-teacher-tiny"):
        build(name, progress=None)  # what is not built yet is not looked at
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(map(chat, range(12))))

    def write(changes: dict[str, Any] | None = None, *words: str) -> Any:
        content = yaml.safe_load(RECIPE) | {"run_dir": str(tmp_path / "run")} | (changes or {})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return load(tmp_path / "recipe.yaml", words)

    return write


def test_a_run_on_chat_that_goes_on_inside_a_round_ends_as_the_unbroken_one(recipe) -> None:
    made = recipe()
    folder = train(made)
    whole = load_file(folder / "student" / "model.safetensors")
    waiting = json.loads((folder / "checkpoint-4" / "rollouts_0.json").read_text())["steps"]
    assert waiting and {"their_ids", "their_labels", "their_closing"} <= waiting[0]["micro"][0][0].keys()
    shutil.rmtree(folder / "checkpoint-8")
    shutil.rmtree(folder / "student")
    train(made, resume=True)
    resumed = load_file(folder / "student" / "model.safetensors")
    assert all((whole[name] == resumed[name]).all() for name in whole)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples and all(len(one["divergence"]) == len(one["tokens"]) for one in samples)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_and_prompts_alone_are_completed_and_read(recipe, tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{n}("}) + "\n" for n in range(8)))
    for data in ({"path": "sandbox:code/train", "limit": 4}, {"path": str(tmp_path / "prompts.jsonl")}):
        made = recipe(
            {
                "data": {"train": [data], "max_length": 24, "streaming": streaming},
                "method": {"name": "alm", "student_share": 1.0},
                "rollouts": {"prompt_tokens": 6, "sampling": {"max_new_tokens": 6, "samples_per_prompt": 2}},
            },
            "training.max_steps=2",
            "training.save_strategy=no",
        )
        check(made)
        shutil.rmtree(train(made))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollouts": None}, r"rollouts: missing; alm trains on the student's own text"),
        ({"method": {"name": "alm"}}, r"rollouts: alm trains on the data's text only: .* or set method\.student_share"),
        ({"rollouts": {"sampling": {"teacher_share": 0.2}}}, r"teacher_share: .* with the student's tokenizer"),
        ({"teacher": None}, r"teacher: missing; alm with these losses needs teacher"),
        ({"data": {"train": [{"path": "rows.jsonl"}], "packing": "pack"}}, r"data\.packing: rows are prompts"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(recipe, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(recipe(changes))


def folder_of(model: str, path: Path, **config: Any) -> dict[str, str]:
    """A copy of a sandbox model whose tokenizer's settings are changed."""
    shutil.copytree(build(model, progress=None), path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | config).items() if v is not None}))
    return {"name": "local", "path": str(path)}


def test_a_teacher_without_a_chat_template_is_told_where_to_get_one(recipe, tmp_path: Path) -> None:
    teacher = folder_of("code-teacher-tiny", tmp_path / "teacher", chat_template=None)
    (tmp_path / "teacher" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"the teacher's tokenizer: .* has none: set data\.teacher_chat_template"):
        check(recipe({"teacher": teacher}))
    data = {"train": [{"path": "rows.jsonl"}], "teacher_chat_template": "{{ messages[0].content }}"}
    check(recipe({"teacher": teacher, "data": data}))


def test_a_student_whose_tokens_do_not_say_their_text_keeps_to_the_datas(recipe, tmp_path: Path) -> None:
    student = folder_of("code-student-tiny-unigram", tmp_path / "student") | {"name": "pretrained"}
    shutil.copytree(build("code-tokenizer-wordpiece-1k", progress=None), tmp_path / "student", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"method\.student_share: the student's tokenizer does not give back"):
        check(recipe({"student": student}))
    check(recipe({"student": student, "method": {"name": "alm"}, "rollouts": None}))


def test_the_look_says_what_one_tokenizer_would_allow_and_what_is_not_used(recipe) -> None:
    same = {"student": {"name": "sandbox", "model": "code-student-tiny"}}
    assert any("are identical: logit_kd compares whole" in line for line in check(recipe(same)))
    data = {"train": [{"path": "rows.jsonl"}], "teacher_max_length": 64}
    plain = {"method": {"name": "logit_kd"}, "losses": [{"name": "forward_kl"}], "rollouts": None, "data": data}
    assert any("data: note: teacher_max_length does nothing here" in line for line in check(recipe(same | plain)))
    with pytest.raises(ValueError, match=r"or a method across tokenizers \(alm, gold"):
        check(recipe(plain))
