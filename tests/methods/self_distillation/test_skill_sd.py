"""Skill-SD in a run: who is told which skill, what it leaves no trace on, and a bank that survives and is shared."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import on_ranks
from safetensors.torch import load_file
from self_attempts import seen, trainer, weights

from kdlm.methods import SkillSD
from kdlm.rollouts import Completion, Written
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import SelfTeacher

RETRY = {"name": "retry", "turns": 3, "ask": "wrong: again", "reward": "sum"}


def score(texts: Any, rows: Any) -> list[float]:
    return [len(text) % 3 / 2 for text in texts]


def made(folder: Path, method: Any = None, **options: Any) -> Any:
    """Six prompts of three episodes each, of up to three turns."""
    settings = {"samples": 3, "environment": RETRY, "reward": score, "columns": lambda n: {"domain": n % 2}}
    return trainer(
        folder, method or SkillSD(weight=1.0, task="domain", success=0.5), SelfTeacher("current"), **settings | options
    )


def test_from_the_second_round_on_the_teacher_is_told_a_skill_of_its_task(tmp_path):
    run_of = made(tmp_path, max_steps=3)
    first, *later = seen(run_of)
    assert not first["informed"].any() and all(batch["informed"].all() for batch in later)
    assert {*run_of.method.bank.skills} == {"0", "1"}
    tried = [sum(skill.tries for skill in skills) for skills in run_of.method.bank.skills.values()]
    assert tried == [6, 6]  # two rounds, three prompts of each task
    assert [log["skills"] > 0 for log in run_of.state.log_history if "skills" in log] == [True] * 3
    assert run_of.state.log_history[0]["skill"] == 0.0 != run_of.state.log_history[1]["skill"]


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_no_gradient_comes_from_what_an_environment_said(tmp_path, layout):
    run_of, kept = made(tmp_path, max_steps=2, layout=layout), []

    def hook(module: Any, inputs: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(kept.append)

    handle = run_of.student.model.norm.register_forward_hook(hook)
    batches = seen(run_of)
    handle.remove()
    for batch, gradient in zip(batches, kept, strict=True):
        felt, drawn = gradient.abs().sum(-1)[:, :-1] > 0, batch["sampled"][:, 1:]
        assert not felt[~drawn].any() and (batch["turn"] > 0).any()
        assert (batch["labels"][:, 1:][~drawn] == IGNORE_INDEX).all()
    assert felt[drawn].float().mean() > 0.4


def test_how_the_batch_is_cut_shows_neither_in_weights_nor_in_skills(tmp_path):
    found = []
    for number, options in enumerate(
        ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {"layout": "padding_free"})
    ):
        run_of = made(tmp_path / str(number), max_steps=3, optim="sgd", learning_rate=0.5, **options)
        run_of.section = run_of.rounds.section = run_of.section.model_copy(
            update={"sampling": run_of.section.sampling.model_copy(update={"temperature": 0})}
        )
        found.append((weights(run_of), run_of.method.bank.skills))
    for other, skills in found[1:]:
        assert skills == found[0][1]
        for name, value in found[0][0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-8)


def test_the_order_of_the_ranks_completions_is_inert():
    def one(index: int, said: str, reward: float) -> Written:
        talk = [[f"call {said}", "error: no"], ["answer: 1", "right"]]
        return Written({"index": index}, [1], Completion([1], [0.0], "end", 0), "", reward, context="c", talk=talk)

    groups = [[one(n, word, float(word == "b")) for word in "ab"] for n in range(3)]
    banks = []
    for order in itertools.permutations(groups):
        method = SkillSD()
        method.trained_on([one for group in order for one in group])
        banks.append(method.bank.written())
    assert len(set(banks)) == 1


def test_ranks_share_one_bank_of_skills(tmp_path):
    """Two ranks keep what one process keeps, and learn what it learns. Greedy: it does not matter who writes."""
    script = Path(__file__).with_name("two_ranks_skills.py")
    for count, name in enumerate(("one", "two"), 1):
        (tmp_path / name).mkdir()
        on_ranks(count, script, tmp_path / name, str(6 // count))
    one, *two = (tmp_path / place for place in ("one/bank-0", "two/bank-0", "two/bank-1"))
    assert all(rank.read_bytes() == one.read_bytes() for rank in two) and len(one.read_bytes()) > 100
    first, second = (load_file(tmp_path / name / "weights") for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("weights_of", "rollouts"),
    [
        ("current", {}),
        ("snapshot", {"every": 2}),
        ("current", {"every": 2, "reuse": 2}),
        ("current", {"every": 2, "asynchronous": True}),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_the_unbroken_one(tmp_path, rollouts, weights_of):
    def fresh(**options: Any) -> Any:
        every = 2 if weights_of == "snapshot" else None
        method = SkillSD(weight=1.0, task="prompt", success=0.5)
        return trainer(
            tmp_path, method, SelfTeacher(weights_of, every=every), samples=2, environment=RETRY, reward=score,
            per_device_train_batch_size=3, max_steps=5, rollouts=rollouts, **options,
        )  # fmt: skip

    whole = fresh(save_strategy="steps", save_steps=3)
    unbroken = weights(whole)
    skills = whole.method.bank.written()
    cut = fresh()
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    cut.close()
    assert cut.method.bank.written() == skills and len(cut.method.bank)
    for name, value in cut.student.named_parameters():
        assert torch.equal(value, unbroken[name]), name
    never = fresh()
    assert all(torch.equal(value, unbroken[name]) for name, value in weights(never).items())  # checkpoints are inert


def test_evaluation_adds_no_skill(tmp_path):
    run_of = made(tmp_path, max_steps=2)
    run_of.train()
    before = run_of.method.bank.written()
    run_of.rounds.complete(run_of.train_dataset, 2)
    assert run_of.method.bank.written() == before
    run_of.close()


def test_a_task_that_rows_do_not_name_is_said():
    with pytest.raises(ValueError, match=r"method\.task: domain, and a row has no domain"):
        SkillSD(task="domain").told([Written({"index": 0}, [1], Completion([1], [0.0], "end", 0))])
