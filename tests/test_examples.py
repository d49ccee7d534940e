"""The examples run as a reader would run them."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kdlm.data import DataSection, Source, load_data
from kdlm.losses import chunked, forward_kl, kept_rows
from kdlm.models import named

EXAMPLES = Path(__file__).parents[1] / "examples"
OWN_SCRIPT, TARGET_ANSWERS = EXAMPLES / "own_script.py", EXAMPLES / "target_answers.py"
TINY = "sandbox:code-teacher-tiny"


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


def test_the_targets_answers_are_read_back_as_the_tokens_that_it_drew(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def f(", "import os\n", "x" * 500)))
    options = ["--target", TINY, "--prompts", str(prompts), "--out", str(out), "--max-length", "40"]
    script = runpy.run_path(str(TARGET_ANSWERS))
    drawn = []
    told = script["answers"]

    def listening(*given):
        for temperature, prompt, completion in told(*given):
            drawn.append((temperature, [*prompt, *completion], len(prompt)))
            yield temperature, prompt, completion

    main = script["main"]
    monkeypatch.setitem(main.__globals__, "answers", listening)
    monkeypatch.setattr(sys, "argv", ["target_answers.py", *options, "--temperatures", "0", "1", "0.7"])
    main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = named(TINY).tokenizer()
    read: Any = load_data(DataSection(train=[Source(path=str(out))]), tokenizer).train
    assert len(drawn) == 6 and len(rows) == len(read) > 0  # the third prompt is longer than 40 tokens
    kept = 0
    for row, sequence in zip(rows, read, strict=True):
        ids = [token for token in sequence["input_ids"] if token != tokenizer.eos_token_id]
        first = next(place for place, label in enumerate(sequence["labels"]) if label != -100)
        assert any(
            (temperature, size) == (row["temperature"], first) and whole[: len(ids)] == ids
            for temperature, whole, size in drawn
        )
        kept += len(ids) - first
    counts = [int(number) for number in re.findall(r"\d+", capsys.readouterr().out.partition(": ")[2])]
    tokens = sum(len(whole) - size for _, whole, size in drawn)
    assert counts[:2] == [len(rows), 6] and counts[3] == tokens and counts[4] == 6 - len(rows)
    assert 0 <= counts[2] - kept <= 6  # end tokens that were drawn


def test_an_answer_ends_where_a_recipe_would_read_other_tokens():
    script = runpy.run_path(str(TARGET_ANSWERS))
    tokenizer = named(TINY).tokenizer()
    writer = script["Writer"](tokenizer)
    prompt, good = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("def f(", "self):\n    return ")
    )
    assert writer.row(prompt, good) == ({"prompt": "def f(", "completion": "self):\n    return "}, len(good))
    ended = [*good, tokenizer.eos_token_id]
    assert writer.row(prompt, ended)[1] == len(ended)
    whole = tokenizer("import", add_special_tokens=False)["input_ids"]
    letters = [token for letter in "import" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert whole != letters
    kept = writer.row(prompt, [*good, *letters])[1]
    assert kept < len(good) + len(letters)
    assert writer.row(prompt, tokenizer(" ", add_special_tokens=False)["input_ids"]) == ({}, 0)
