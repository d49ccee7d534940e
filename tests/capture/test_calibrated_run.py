"""FIRST, small: an overconfident teacher makes an overconfident student, and a re-calibrated one does not."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm.capture import capture
from kdlm.data import load_data
from kdlm.losses import kept_rows
from kdlm.recipe import Recipe, load
from kdlm.sandbox import build
from kdlm.teachers import LocalTeacher
from kdlm.teachers.calibration import expected_calibration_error
from kdlm.train import train

RECIPE = """
student: {name: sandbox, model: code-student-tiny}
teacher:
  name: cached
  path: {FOLDER}/capture
  of: {name: local, path: {FOLDER}/teacher}
  format: {name: top_k, k: 5}
data: {train: [{path: "sandbox:code/train", limit: 12}], max_length: 64, eval_rows: 3}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 250, per_device_train_batch_size: 8, learning_rate: 0.01, lr_scheduler_type: cosine,
           logging_steps: 250, eval_strategy: "no", save_strategy: "no", use_cpu: true}
run_dir: {FOLDER}/run
"""


def sure_teacher(folder: Path) -> None:
    """Write the tiny teacher with its logits doubled: of the same opinion, and twice as sure of it."""
    model = AutoModelForCausalLM.from_pretrained(build("code-teacher-tiny"))
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(build("code-teacher-tiny")).save_pretrained(folder)


def judged(recipe: Recipe, student: Path) -> tuple[float, float]:
    """Return calibration error and accuracy on the held-out rows."""
    data = load_data(recipe.data, recipe.student.tokenizer())
    model = LocalTeacher(AutoModelForCausalLM.from_pretrained(student))
    confidence, hit = [], []
    for row in data.eval:
        batch = data.collator([row])
        rows = kept_rows(batch["labels"])
        signal = model(batch, rows)
        top = signal.head.logits(signal.hidden).softmax(-1).max(-1)
        confidence.append(top.values)
        hit.append(top.indices == rows.labels)
    return expected_calibration_error(torch.cat(confidence), torch.cat(hit)), torch.cat(hit).float().mean().item()


@pytest.mark.slow
def test_a_calibrated_cache_gives_a_better_calibrated_student_of_no_less_accuracy(tmp_path: Path) -> None:
    sure_teacher(tmp_path / "teacher")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{FOLDER}", str(tmp_path)))
    capture(load(path))
    found = {}
    for name in ("none", "temperature", "label_smoothing"):
        overrides = [f"run_dir={tmp_path / name}"]
        if name != "none":
            overrides.append(f"teacher.calibration={{name: {name}}}")
        recipe = load(path, overrides)
        found[name] = judged(recipe, train(recipe) / "student")
    print(found)
    for name in ("temperature", "label_smoothing"):
        assert found[name][0] < found["none"][0] * 0.8, found
        assert found[name][1] > found["none"][1] - 0.01, found
