"""OnPolicyTrainer with a teacher of another tokenizer: it reads the student's own text with its own tokens."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from loopback import source
from transformers import TrainingArguments

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data.load import text_collator
from kdlm.losses import JSD, CrossEntropy, ForwardKL
from kdlm.methods import ALM, GOLD, ULD, SharedVocabularyKD, VocabularyProjection
from kdlm.rollouts import RolloutSection
from kdlm.samples import look
from kdlm.sandbox import build
from kdlm.signal import IGNORE_INDEX

SECTION = {"sampling": {"max_new_tokens": 24}}
WORDS = ["def f(x", "return ", "import os", "# naïve ", "x = [1, ", "for i in", "class A:", "🙂 = "]


@cache
def tokenizers() -> tuple[Any, Any]:
    return source("code-student-tiny-bytes").tokenizer(), source().tokenizer()


@cache
def warmed() -> dict[str, torch.Tensor]:
    """The weights of a student that has seen some code, and so writes text for the most part."""
    ours, _ = tokenizers()
    text = (Path(build("code", progress=None)) / "train.jsonl").read_text(encoding="utf-8")[:20000]
    ids = torch.tensor(ours(text)["input_ids"])[:12800].view(-1, 64)
    model = source("code-student-tiny-bytes").load()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        batch = ids[step * 4 % 192 : step * 4 % 192 + 8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def student() -> Any:
    model = source("code-student-tiny-bytes").load()
    model.load_state_dict(warmed())
    return model.double()


def rows(count: int = 8) -> list[dict[str, Any]]:
    """What a script has without kdlm's reading of data: the student's tokens alone."""
    ours, _ = tokenizers()
    made = []
    for number in range(count):
        prompt = ours(WORDS[number % 8])["input_ids"]
        answer = [*ours(f"{number} + y:\n")["input_ids"], ours.eos_token_id]
        labels = [IGNORE_INDEX] * len(prompt) + answer
        made.append({"input_ids": prompt + answer, "labels": labels, "index": number, "reference": str(number)})
    return made


def trainer(arguments: Any, method: Any, *, layout: Any = "padded", rollouts: Any = None, **options: Any) -> Any:
    ours, theirs = tokenizers()
    own = {key: options.pop(key) for key in {"reward", "data_collator"} & options.keys()}
    made = OnPolicyTrainer(
        student(),
        source().load().double(),
        arguments(**options),
        method=method,
        rollouts=RolloutSection(**{**SECTION, **(rollouts or {})}),
        train_dataset=rows(),
        processing_class=ours,
        teacher_processing_class=theirs,
        **{"data_collator": text_collator(layout, ours, theirs), **own},
    )
    made.networks.double()
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    made.train()
    made.close()
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


def seen(made: Any) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = []
    losses = made.method.losses
    made.method.losses = lambda nets, batch, *rest: batches.append(batch) or losses(nets, batch, *rest)
    made.train()
    made.close()
    return batches


def alm(text: str = "student", **options: Any) -> ALM:
    method = ALM(**{"temperature": 5.0, "student_share": 1.0, **options})
    method.text = lambda step, draw: text  # type: ignore[method-assign]
    return method


@pytest.mark.parametrize(("text", "samples"), [("student", 2), ("both", 1)])
def test_the_gradient_does_not_show_how_the_batch_was_cut(arguments, text: str, samples: int) -> None:
    rollouts = {"show": 0, "sampling": {"max_new_tokens": 12, "samples_per_prompt": samples}}
    whole = weights(trainer(arguments, alm(text), rollouts=rollouts))
    for options in (
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        {"layout": "padding_free"},
    ):
        other = weights(trainer(arguments, alm(text), rollouts=rollouts, **options))
        for name, weight in whole.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-8, atol=1e-8)
    start = dict(student().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 1e-5


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("text", ["student", "both"])
def test_both_readings_of_a_batch_say_the_same_text(arguments, layout: str, text: str) -> None:
    (batch,) = seen(trainer(arguments, alm(text), layout=layout))
    theirs, (ours, teacher) = batch["theirs"], tokenizers()
    count = 16 if text == "both" else 8
    assert len(batch["bytes"]) == len(batch["truncated"]) == count
    assert batch["index"].tolist() == theirs["index"].tolist()
    assert set(batch["chunks"].unique().tolist()) - {-1} == set(theirs["chunks"].unique().tolist()) - {-1}
    assert (batch["labels"][batch["chunks"] >= 0] != IGNORE_INDEX).all()
    mine, other = (
        tokenizer.decode(side["input_ids"][side["chunks"] >= 0], skip_special_tokens=True)
        for tokenizer, side in ((ours, batch), (teacher, theirs))
    )
    assert mine == other and len(mine) > 20


def test_a_truncated_completion_can_be_left_out_on_both_sides(arguments) -> None:
    made = trainer(arguments, alm(), rollouts={"truncated": "mask", "sampling": {"max_new_tokens": 2}})
    (batch,) = seen(made)
    cut = batch["truncated"]
    assert cut.any()
    for side in (batch, batch["theirs"]):
        assert (side["labels"][cut] == IGNORE_INDEX).all() and (side["chunks"][cut] == -1).all()


def test_cross_entropy_is_on_the_datas_text_alone(arguments) -> None:
    made = trainer(
        arguments, ALM([CrossEntropy()], student_share=0.5), max_steps=12, logging_steps=12, learning_rate=0.0
    )
    own = ["sampled" in batch for batch in seen(made)]
    assert 0 < sum(own) < 12
    (line,) = (log for log in made.state.log_history if "loss" in log)
    assert {"alm", "rollout/length"} <= line.keys()
    data = trainer(arguments, ALM([CrossEntropy()]), learning_rate=0.0)
    data.train()
    assert line["cross_entropy"] == pytest.approx(data.state.log_history[0]["cross_entropy"], rel=1e-5)


def test_what_is_shown_adds_up_to_the_gap_of_the_chunks(arguments) -> None:
    made = trainer(arguments, alm(), rollouts={"show": 3})
    batch = made._prepare_inputs(made.batch_of([], made.rounds.complete(rows(3), 0)))
    looked = look(made.networks.views, batch, temperature=1.0, vocab=None)
    with torch.no_grad():
        readings = made.method.read(made.networks.views, batch)
        inside, theirs = readings.chunks >= 0, readings.their_chunks >= 0
        log_q, log_p = made.method.token_log_probs(readings), made.method.teacher_log_probs(readings)
    gap = (log_q[inside].sum() - log_p[theirs].sum()).item()
    assert math.fsum(looked.divergence) == pytest.approx(gap, rel=1e-5)
    assert looked.mean == pytest.approx(gap / int(inside.sum()), rel=1e-5)
    assert looked.gap < 1e-4 and len(looked.divergence) == len(looked.log_probs) == int(batch["sampled"].sum())
    made.close()


def test_a_log_has_samples_and_evaluation_takes_the_students_own_text(arguments) -> None:
    made = trainer(
        arguments, alm(), rollouts={"eval_prompts": 5, "show": 2}, reward=lambda texts, given: [0.25] * len(given)
    )
    made.eval_dataset = Dataset.from_list(rows())
    made.train()
    assert len(made.samples) == 2 and all(len(one.divergence) == len(one.tokens) for one in made.samples)
    metrics = made.evaluate()
    assert metrics["eval_rollout_reward"] == 0.25
    assert metrics["eval_rollout_bits_per_byte"] > 0 and metrics["eval_teacher_bits_per_byte"] > 0
    made.close()


def test_the_gap_of_chunks_falls_on_the_students_own_text(arguments) -> None:
    """How far apart student and teacher find the chunks that the student writes, with the weights of then."""
    made = trainer(
        arguments, ALM(student_share=1.0), max_steps=40, optim="adamw_torch", learning_rate=5e-3,
        rollouts={"every": 2, "show": 0},
    )  # fmt: skip

    def gap() -> float:
        batch = made._prepare_inputs(made.batch_of([], made.rounds.complete(rows(), 0, samples=4)))
        with torch.no_grad():
            readings = made.method.read(made.networks.views, batch)
            ours = readings.over_chunks(made.method.token_log_probs(readings))
            apart = ours - readings.over_their_chunks(made.method.teacher_log_probs(readings))
        return (apart.abs().sum() / (readings.lengths()[0] > 0).sum()).item()

    before = gap()
    made.train()
    after = gap()
    made.close()
    assert after < 0.8 * before, (before, after)


def test_the_teachers_tokens_cannot_be_mixed_into_the_students_text(arguments) -> None:
    with pytest.raises(ValueError, match="a local teacher with the student's tokenizer"):
        trainer(arguments, alm(), rollouts={"sampling": {"teacher_share": 0.2}})


def test_a_plain_script_hands_over_two_tokenizers(tmp_path: Path) -> None:
    """As an own script does: models, tokenizers, tokenised rows, TrainingArguments."""
    ours, theirs = tokenizers()
    trainer = DistillTrainer(
        model=student().float(),
        teacher=source().load(),
        args=TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"),
        method=ALM([CrossEntropy()]),
        train_dataset=Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows(4)),
        processing_class=ours,
        teacher_processing_class=theirs,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_bits_per_byte"] > 0 and metrics["eval_teacher_bits_per_byte"] > 0
    with pytest.raises(ValueError, match="teacher_processing_class"):
        DistillTrainer(student(), source().load(), trainer.args, method=ALM(), processing_class=ours)


@pytest.mark.parametrize(
    "method",
    [
        lambda: GOLD(student_share=1.0),
        lambda: ULD(student_share=1.0),
        lambda: SharedVocabularyKD([JSD()], student_share=1.0),
        lambda: VocabularyProjection([ForwardKL()], onto="student", student_share=1.0),
    ],
    ids=["gold", "uld", "shared_vocabulary_kd", "vocabulary_projection"],
)
def test_methods_that_compare_distributions_learn_from_the_students_own_text(arguments, method) -> None:
    begun = dict(student().named_parameters())
    after = weights(trainer(arguments, method(), rollouts={"show": 0, "sampling": {"max_new_tokens": 12}}))
    assert all(weight.isfinite().all() for weight in after.values())
    assert max((after[name] - begun[name]).abs().max() for name in begun) > 1e-6
