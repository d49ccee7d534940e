"""The examples run as a reader would run them."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import torch

from kdlm.losses import chunked, forward_kl, kept_rows

OWN_SCRIPT = Path(__file__).parents[1] / "examples" / "own_script.py"


def test_the_student_of_the_own_script_comes_nearer_to_its_teacher_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, str(OWN_SCRIPT), "--steps", "50", "--chunked"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    logged = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{'loss'")]
    losses = [float(entry["loss"]) for entry in logged]
    assert len(losses) == 4  # two of the teacher, then two of the student
    assert losses[3] < 0.7 * losses[2]
    assert list(tmp_path.iterdir()) == []


def test_the_own_script_reads_hidden_states_that_give_the_same_loss_and_gradient_as_logits():
    script = runpy.run_path(str(OWN_SCRIPT))
    teacher, student = script["llama"](24, 2).double(), script["llama"](16, 1).double()
    batch = {key: torch.stack([example[key] for example in script["examples"](3)]) for key in ("input_ids", "labels")}
    rows = kept_rows(batch["labels"])

    def gradient(whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        read = script["logits" if whole else "hidden"]
        pair = read(student, batch["input_ids"], rows), read(teacher, batch["input_ids"], rows)
        values = forward_kl(pair[0], pair[1].detach()) if whole else chunked(forward_kl, *pair)
        return values.detach(), torch.autograd.grad(values.sum(), student.lm_head.weight)[0]

    torch.testing.assert_close(gradient(whole=False), gradient(whole=True))
