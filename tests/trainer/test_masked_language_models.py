"""Masked language models under the trainers: invariance, resumption, what is refused, and what they learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import source
from tiny_masked import texts, tiny_masked

from kdlm import DistillTrainer, OnPolicyTrainer
from kdlm.data import Collator
from kdlm.losses import CrossEntropy, ForwardKL
from kdlm.methods import GDSD, LogitKD, MaskedKD
from kdlm.models import Lora, MaskedLanguageModel, adapt
from kdlm.rollouts import RolloutSection

LENGTHS = [6, 9, 7, 5, 8, 6, 9, 4]


class Plain:
    """A tokenizer of numbers."""

    eos_token_id, pad_token_id = 1, 0

    def batch_decode(self, rows: list[list[int]], **options: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]

    def decode(self, row: list[int]) -> str:
        return self.batch_decode([row])[0]

    def __len__(self) -> int:
        return 13

    def save_pretrained(self, folder: Any) -> None:
        pass


def distilling(arguments: Any, *, layout: Any = "padded", losses: Any = None, **options: Any) -> DistillTrainer:
    return DistillTrainer(
        tiny_masked(), tiny_masked(1), arguments(**options), method=MaskedKD(losses or [CrossEntropy(), ForwardKL()]),
        train_dataset=texts(LENGTHS), eval_dataset=texts(LENGTHS, seed=2), data_collator=Collator(0, layout=layout),
    )  # fmt: skip


def on_policy(arguments: Any, method: GDSD, *, layout: Any = "padded", reward: Any = None, **options: Any) -> Any:
    sampling = {"max_new_tokens": 5, "samples_per_prompt": 2}
    made = OnPolicyTrainer(
        tiny_masked(), None, arguments(**options), method=method,
        rollouts=RolloutSection(engine={"name": "unmask"}, sampling=sampling, reuse=method.inner_steps),
        reward=reward or (lambda texts, rows: [sum(map(int, text.split())) / 10 for text in texts]),
        train_dataset=texts(LENGTHS), processing_class=Plain(), data_collator=Collator(0, layout=layout),
    )  # fmt: skip
    made.networks.double()
    for average in made.networks.averages.values():
        average.double()
    return made


def weights(made: Any) -> dict[str, torch.Tensor]:
    made.train()
    made.close()
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}


def assert_same(ours: Any, other: Any, tolerance: float) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(other[name], weight, rtol=tolerance, atol=tolerance)


CUTS = (
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    {"layout": "padding_free"},
)


def test_the_gradient_of_distillation_does_not_show_how_the_batch_was_cut(arguments) -> None:
    whole = weights(distilling(arguments))
    for cut in CUTS:
        assert_same(whole, weights(distilling(arguments, **cut)), 1e-9)
    start = dict(tiny_masked().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 1e-4


def test_the_gradient_of_gdsd_does_not_show_how_the_batch_was_cut(arguments) -> None:
    def method() -> GDSD:
        return GDSD(inner_steps=1, masks=2)

    whole = weights(on_policy(arguments, method()))
    for cut in CUTS:
        assert_same(whole, weights(on_policy(arguments, method(), **cut)), 1e-8)
    start = dict(tiny_masked().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 1e-4


def assert_resumes(make: Callable[[], Any], folder: Path) -> None:
    """Let one run go on unbroken and another from its checkpoint, and compare all that they leave behind."""
    first = make()
    whole = weights(first)
    again = make()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    again.close()
    assert_same(whole, dict(again.student.named_parameters()), 0.0)
    assert first.networks.averages.keys() == again.networks.averages.keys()
    for name, average in first.networks.averages.items():
        assert_same(dict(average.named_parameters()), dict(again.networks.averages[name].named_parameters()), 0.0)


def test_a_distillation_that_is_resumed_ends_as_the_unbroken_one(arguments, tmp_path) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    assert_resumes(lambda: distilling(arguments, **options), tmp_path / "run")


def test_gdsd_that_is_resumed_within_a_generation_ends_as_the_unbroken_one(arguments, tmp_path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}

    def make() -> Any:
        return on_policy(arguments, GDSD(inner_steps=2, reference_every=4, masks=2, clip=0.9), **options)

    assert_resumes(make, tmp_path / "run")


def test_evaluation_gives_the_bound_and_the_distance_to_the_teacher_whatever_the_batches(arguments) -> None:
    found = [distilling(arguments, per_device_eval_batch_size=size).evaluate() for size in (1, 3, 8)]
    for name in ("eval_cross_entropy", "eval_forward_kl", "eval_top1_agreement"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6) == pytest.approx(found[2][name], rel=1e-6)
    assert 0 <= found[0]["eval_top1_agreement"] <= 1


def test_kinds_of_model_that_do_not_fit_are_refused_with_what_does(arguments) -> None:
    causal = source("code-student-tiny").load()
    with pytest.raises(ValueError, match=r"LogitKD is for causal language models.*use MaskedKD or GDSD"):
        DistillTrainer(tiny_masked(), tiny_masked(1), arguments(), method=LogitKD([ForwardKL()]))
    with pytest.raises(ValueError, match=r"MaskedKD is for masked language models.*no mask_token_id"):
        DistillTrainer(causal, tiny_masked(1), arguments(), method=MaskedKD([ForwardKL()]))
    with pytest.raises(ValueError, match=r"MaskedKD needs teacher\.unmasking, but LocalTeacher does not provide it"):
        DistillTrainer(tiny_masked(), causal, arguments(), method=MaskedKD([ForwardKL()]))
    with pytest.raises(ValueError, match=r"rollouts\.engine: a masked language model does not write by generate"):
        OnPolicyTrainer(
            tiny_masked(), None, arguments(), method=GDSD(inner_steps=1), reward=lambda texts, rows: [0.0] * len(rows),
            train_dataset=texts(LENGTHS), processing_class=Plain(), data_collator=Collator(0),
        )  # fmt: skip


def test_gdsd_raises_a_reward_that_can_be_counted(arguments) -> None:
    made = on_policy(
        arguments, GDSD(inner_steps=1, psi=1.0, masks=4, kl_weight=0.01),
        reward=lambda texts, rows: [text.split().count("7") / 5 for text in texts],
        max_steps=60, per_device_train_batch_size=8, optim="adamw_torch", learning_rate=3e-3,
    )  # fmt: skip
    made.train()
    made.close()
    rewards = [logs["rollout/reward"] for logs in made.state.log_history if "rollout/reward" in logs]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.2


def test_distillation_brings_a_student_nearer_to_its_teacher_than_the_data_alone(arguments) -> None:
    teacher = MaskedLanguageModel(path="sandbox:masked-tiny").load()
    tokenizer = MaskedLanguageModel(path="sandbox:masked-tiny").tokenizer()
    sums = [(a, b) for a in range(0, 100, 7) for b in range(3, 100, 7)]
    rows = []
    for number, (a, b) in enumerate(sums):
        ids = [*tokenizer(f"{a:02d}+{b:02d}={a + b:03d}")["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * 6 + ids[6:], "index": number})
    settings = {"max_steps": 80, "per_device_train_batch_size": 32, "optim": "adamw_torch", "learning_rate": 3e-3}
    distances = []
    for losses in ([CrossEntropy()], [ForwardKL()]):
        torch.manual_seed(0)
        student = MaskedLanguageModel(path="sandbox:masked-student").load()
        made = DistillTrainer(
            student, teacher, arguments(**settings),
            method=MaskedKD(losses), train_dataset=rows[::2], eval_dataset=rows[1::2], processing_class=tokenizer,
        )  # fmt: skip
        made.train()
        distances.append(made.evaluate()["eval_kl_to_teacher"])
    assert distances[1] < 0.9 * distances[0]


def test_adapters_of_a_masked_model_train_and_leave_its_own_weights(arguments) -> None:
    model = adapt(tiny_masked(), Lora(rank=2, target_modules="all-linear"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    made = DistillTrainer(
        model, None, arguments(max_steps=2, learning_rate=0.1), method=MaskedKD([CrossEntropy()]),
        train_dataset=texts(LENGTHS), data_collator=Collator(0),
    )  # fmt: skip
    made.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value.cpu(), before[name])}
    assert moved and all("lora_" in name for name in moved)
