"""Test-time self-improvement: how sure a model is, that it is left as it was, and that no one sure is touched."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import source

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "test_time_training.py"))
ROW = {"input": "What is 3 + 4?\n", "candidates": ["calc: 3 + 4", "get a", "answer: 7"], "answer": "calc: 3 + 4"}
PAIRS = [("What is 5 + 6?\n", "calc: 5 + 6"), ("What is 2 - 9?\n", "calc: 2 - 9")]


def settings(**changes: Any) -> argparse.Namespace:
    defaults = {"tau": 0.95, "pairs": 2, "rank": 8, "epochs": 5, "learning_rate": 1e-2}
    return argparse.Namespace(**defaults | changes)


@pytest.fixture
def student() -> tuple[Any, Any]:
    made = source("code-student-tiny")
    return made.load().eval(), made.tokenizer()


def digest(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_awareness_is_between_none_and_all_and_blind_to_a_shared_shift():
    draw, u = torch.Generator().manual_seed(0), SCRIPT["awareness"]
    for count in (1, 2, 3, 9):
        for scale in (0.0, 1.0, 50.0):
            found = scale * torch.randn(count, generator=draw)
            assert 0 <= u(found) <= 1
            assert u(found + 7.5) == pytest.approx(u(found), abs=1e-5)
    assert u(torch.tensor([2.0, 2.0, 0.0])) == 0 and u(torch.tensor([3.0])) == 1
    assert u(torch.tensor([100.0, 0.0])) == pytest.approx(1)


def test_the_likeliest_candidate_is_chosen_and_not_the_unlikeliest(student):
    """The sign that is printed wrong; and a mean, so that a long candidate is not unlikely for its length."""
    model, tokenizer = student
    found = SCRIPT["scores"](model, tokenizer, ROW["input"], ["a", "a" * 40])
    row = SCRIPT["encoded"](tokenizer, ROW["input"], "a" * 40)
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    loss = model(input_ids=ids[None], labels=labels[None]).loss
    torch.testing.assert_close(found[1], -loss)
    told = SCRIPT["answer"](model, tokenizer, ROW, lambda *_: [], settings(), 0)
    best = SCRIPT["scores"](model, tokenizer, ROW["input"], ROW["candidates"]).argmax()
    assert told["first"] == told["chosen"] == ROW["candidates"][int(best)]


def test_after_an_answer_every_parameter_is_what_it_was_to_the_bit(student):
    model, tokenizer = student
    before, flags = digest(model), [p.requires_grad for p in model.parameters()]
    first = SCRIPT["answer"](model, tokenizer, ROW, lambda *_: PAIRS, settings(tau=1.1), 0)
    assert first["pairs"] == 2
    assert digest(model).keys() == before.keys() and flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in digest(model).items())
    again = SCRIPT["answer"](model, tokenizer, ROW, lambda *_: PAIRS, settings(tau=1.1), 0)
    assert again == first


def test_training_on_similar_pairs_makes_their_kind_of_action_likelier(student):
    model, tokenizer = student
    given = ROW["input"], ["calc: 3 + 4"]
    before = SCRIPT["scores"](model, tokenizer, *given)
    after = SCRIPT["scores"](SCRIPT["adapted"](model, tokenizer, PAIRS, settings(), 0), tokenizer, *given)
    assert after > before + 0.1


def test_with_a_threshold_of_nothing_nothing_is_asked_nor_trained(student):
    model, tokenizer = student

    def never(*given: Any) -> Any:
        raise AssertionError("nobody is to be asked")

    told = SCRIPT["answer"](model, tokenizer, ROW, never, settings(tau=0.0), 0)
    assert told["chosen"] == told["first"] and told["pairs"] == 0


def test_pairs_are_read_a_line_each_and_never_hold_the_input_that_is_asked(student):
    model, tokenizer = student
    similar = SCRIPT["Generator"](model, tokenizer, "{input}{action}\n\n", 8)
    written = ["What is 1 + 1?\ncalc: 1 + 1\n\nWhat", "\nHow?\n\nget b", "one line", f"{ROW['input']}calc: 3 + 4", ""]
    drawn = [argparse.Namespace(ids=tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written]
    asked = []
    similar.engine = argparse.Namespace(generate=lambda *given: asked.append(given) or drawn)
    assert similar(ROW["input"], "calc: 3 + 4", 5, 0) == [("What is 1 + 1?\n", "calc: 1 + 1"), ("How?\n", "get b")]
    ((prompts, sampling, _),) = asked
    assert tokenizer.decode(prompts[0]).endswith("What is 3 + 4?\ncalc: 3 + 4\n\n") and sampling.samples_per_prompt == 5


def test_the_script_counts_what_it_did(tmp_path, monkeypatch, capsys):
    inputs = tmp_path / "inputs.jsonl"
    inputs.write_text("".join(json.dumps(ROW) + "\n" for _ in range(2)))
    command = ["x", "--student", "sandbox:code-student-tiny", "--inputs", str(inputs), "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--generator", "sandbox:code-teacher-tiny", "--max-tokens", "16"])
    SCRIPT["main"]()
    said = capsys.readouterr().out
    assert said.startswith("2 inputs, 2 uncertain, ") and "right: " in said
