"""FIRST, small: an overconfident teacher makes an overconfident student, and a re-calibrated one does not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdlm.capture import capture
from kdlm.data import load_data
from kdlm.losses import kept_rows
from kdlm.recipe import Recipe, load
from kdlm.sandbox import build
from kdlm.teachers import LocalTeacher
from kdlm.teachers.calibration import expected_calibration_error
from kdlm.train import train

RECIPE = """
student: {name: fresh, config_from: {STUDENT}}
data: {train: [{path: {FOLDER}/chain.jsonl}], max_length: 64, eval_rows: 60}
method: {name: sequence_kd}
losses: [{name: cross_entropy}]
training: {max_steps: 150, per_device_train_batch_size: 16, learning_rate: 0.01, lr_scheduler_type: cosine,
           logging_steps: 150, eval_strategy: "no", save_strategy: "no", use_cpu: true}
run_dir: {FOLDER}/teacher-run
"""


def chain(rows: int) -> list[str]:
    """Return texts of a Markov chain over letters: what follows is a matter of chance, of which the letter says how."""
    generator = np.random.default_rng(0)
    letters = "abcdefghijkl"
    law = generator.dirichlet(np.full(len(letters), 0.6), size=len(letters))
    texts = []
    for _ in range(rows):
        at = [0]
        for _ in range(60):
            at.append(generator.choice(len(letters), p=law[at[-1]]))
        texts.append(" ".join(letters[place] for place in at))
    return texts


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
    (tmp_path / "chain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in chain(500)))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{FOLDER}", str(tmp_path)).replace("{STUDENT}", str(build("code-student-tiny"))))
    teacher = train(load(path, [f"student.config_from={build('code-teacher-tiny')}"])) / "student"
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)  # of the same opinion, and twice as sure of it
    model.save_pretrained(teacher)
    cached = f"teacher={{name: cached, path: {tmp_path / 'capture'}, of: {{name: local, path: {teacher}}}}}"
    distil = [cached, "teacher.format={name: top_k, k: 5}", "method={name: logit_kd}", "losses=[{name: forward_kl}]"]
    capture(load(path, distil))
    found = {"text alone": judged(load(path), train(load(path, [f"run_dir={tmp_path / 'text'}"])) / "student")}
    for name in ("none", "temperature", "label_smoothing"):
        calibration = [] if name == "none" else [f"teacher.calibration={{name: {name}}}"]
        recipe = load(path, [*distil, *calibration, f"run_dir={tmp_path / name}"])
        found[name] = judged(recipe, train(recipe) / "student")
    for name, lost in (("temperature", 0.02), ("label_smoothing", 0.06)):  # smoothing makes ties of what was close
        assert found[name][0] < found["none"][0] / 2, found
        assert found[name][1] > found["none"][1] - lost, found
