"""Self-distillation from a teacher that is told more: told nothing it teaches nothing, and told something it does."""

import math
from typing import Any

import pytest
import torch
from loopback import source
from pydantic import ValidationError
from transformers import TrainingArguments

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data import Collator, ContextCollator, ContextSection, Reprompt
from kdlm.losses import JSD, ForwardKL, ReverseKL
from kdlm.methods import SelfDistillation
from kdlm.models.adapters import Lora, adapt
from kdlm.rollouts import RolloutSection
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import LocalTeacher, SelfTeacher
from kdlm.teachers.self_teacher import SelfTeacherSection

pytestmark = pytest.mark.filterwarnings("ignore:.*merge.*:UserWarning")
WEIGHTS = ["current", "average", "snapshot", "start"]


def rows(told: list[int], count: int = 6) -> list[dict[str, Any]]:
    """Rows whose teacher reads `told` before their prompt."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for number in range(count):
        ids = torch.randint(5, 500, (7 + number % 3,), generator=generator).tolist()
        row = {"input_ids": ids, "labels": [IGNORE_INDEX] * 3 + ids[3:], "index": number, "asked": "{}"}
        made.append(row | {"context_prompt": [*told, *ids[:3]]} if told else row)
    return made


def trainer(tmp_path, teacher, *, told=(9, 8, 7), method=None, lora=False, kind: Any = DistillTrainer, **options):
    student = source("code-student-tiny")
    model = student.load().double()
    arguments = {
        "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_steps": 3, "learning_rate": 1.0,
        "per_device_train_batch_size": 6, "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 0.0,
    }  # fmt: skip
    rollouts = {} if kind is DistillTrainer else {"rollouts": RolloutSection(sampling={"max_new_tokens": 6})}
    made = kind(
        adapt(model, Lora(rank=2)) if lora else model,
        teacher,
        TrainingArguments(**arguments | options),
        method=method or SelfDistillation([ForwardKL()], student_share=0.0 if kind is DistillTrainer else 1.0),
        train_dataset=rows(list(told)),
        processing_class=student.tokenizer(),
        data_collator=ContextCollator(Collator(0), Reprompt(student.tokenizer(), ContextSection())),
        **rollouts,
    )
    made.networks.to(torch.float64)
    return made


def weights(made) -> dict[str, torch.Tensor]:
    made.train()
    made.close()
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JSD(beta=0.3)])
def test_told_nothing_the_first_step_is_exactly_none(tmp_path, kind, loss, lora):
    """At the start every copy is the student: loss 0 and gradient 0, to the last bit."""
    method = SelfDistillation([loss], student_share=0.0)
    made = trainer(tmp_path, SelfTeacher(kind), told=(), method=method, lora=lora, max_steps=1)
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    after = weights(made)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert made.state.log_history[0]["loss"] == 0.0
    assert made.state.log_history[0]["informed"] == 0.0


def test_with_the_current_weights_and_nothing_told_no_step_ever_moves(tmp_path):
    made = trainer(tmp_path, SelfTeacher("current"), told=())
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_told_something_the_student_learns_what_it_would_have_said(tmp_path, kind, lora):
    made = trainer(
        tmp_path, SelfTeacher(kind, every=2) if kind == "snapshot" else SelfTeacher(kind), lora=lora, max_steps=12
    )
    weights(made)
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert losses[0] > 1e-4 and losses[-1] < 0.9 * losses[0]
    assert made.state.log_history[0]["informed"] == 1.0


def test_the_start_of_a_lora_student_is_its_base_and_costs_no_copy(tmp_path):
    made = trainer(tmp_path, SelfTeacher("start"), lora=True)
    assert not made.networks.averages
    assert list(trainer(tmp_path, SelfTeacher("start")).networks.averages) == ["self_teacher"]


def test_a_frozen_copy_as_another_teacher_is_the_start(tmp_path):
    other = trainer(tmp_path, LocalTeacher(source("code-student-tiny").load().double()))
    ours, theirs = weights(trainer(tmp_path, SelfTeacher("start"))), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("split", [(1, 6), (2, 3), (3, 2)])
def test_the_gradient_does_not_show_how_the_batch_was_cut(tmp_path, split):
    size, count = split
    whole = weights(trainer(tmp_path, SelfTeacher("current"), max_steps=1))
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 1}
    cut = weights(trainer(tmp_path, SelfTeacher("current"), **options))
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-10, atol=1e-12)


def test_infinite_clip_is_none_and_a_clip_of_nothing_stops_all(tmp_path):
    plain = weights(trainer(tmp_path, SelfTeacher("current")))
    method = SelfDistillation([ForwardKL()], student_share=0.0, clip=1e9)
    assert all(
        torch.equal(value, plain[name])
        for name, value in weights(trainer(tmp_path, SelfTeacher("current"), method=method)).items()
    )
    method = SelfDistillation([ForwardKL()], student_share=0.0, clip=1e-12)
    made = trainer(tmp_path, SelfTeacher("current"), method=method)
    before = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in weights(made).items())
    assert made.state.log_history[0]["clipped"] == 1.0


def test_fresh_samples_weigh_one(tmp_path):
    """Drawn by the student of this very step, an importance weight is 1."""
    made = [
        weights(
            trainer(
                tmp_path, SelfTeacher("current"), kind=OnPolicyTrainer,
                method=SelfDistillation([ReverseKL()], importance_cap=cap), max_steps=1,
            )
        )
        for cap in (None, 2.0, math.inf)
    ]  # fmt: skip
    for other in made[1:]:
        for name in made[0]:
            torch.testing.assert_close(other[name], made[0][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_run_killed_in_the_middle_ends_as_an_unbroken_one(tmp_path, kind):
    options = {
        "kind": OnPolicyTrainer,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
    }
    teacher = {"every": 3} if kind == "snapshot" else {}
    whole = weights(trainer(tmp_path / "a", SelfTeacher(kind, **teacher), **options))
    trainer(tmp_path / "b", SelfTeacher(kind, **teacher), **options).train()
    made = trainer(tmp_path / "b", SelfTeacher(kind, **teacher), **options)
    made.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert all(torch.equal(p.detach(), whole[name]) for name, p in made.student.named_parameters())


def test_rows_that_ask_nothing_are_refused(tmp_path):
    student = source("code-student-tiny")
    plain = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    with pytest.raises(ValueError, match="hand over rows with `asked`"):
        DistillTrainer(
            student.load(), SelfTeacher(), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
            method=SelfDistillation([ForwardKL()], student_share=0.0), train_dataset=plain,
            processing_class=student.tokenizer(),
        )  # fmt: skip


def test_an_average_may_move_now_and_then(tmp_path):
    slow, never = (
        trainer(tmp_path, SelfTeacher("average", decay=0.5, every=every), max_steps=steps)
        for every, steps in ((3, 3), (4, 3))
    )
    start = {name: p.detach().clone() for name, p in slow.networks.averages["self_teacher"].named_parameters()}
    for made in (slow, never):
        weights(made)
    moved, still = (dict(made.networks.averages["self_teacher"].named_parameters()) for made in (slow, never))
    assert all(torch.equal(still[name], start[name]) for name in start)
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    assert SelfTeacher("average").every == 1 and SelfTeacher("snapshot").every == 100
    with pytest.raises(ValidationError, match="does nothing with weights: start"):
        SelfTeacherSection(weights="start", every=3)
