"""REDI in the trainer: how pairs are cut into micro-batches and laid out does not show in the weights."""

from typing import Any

import torch
from tiny_models import rows, tiny_model

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.methods import REDI

LENGTHS = [(5, 11), (3, 17), (8, 4), (13, 9), (6, 6), (7, 12)]


def pairs() -> list[dict[str, Any]]:
    chosen, rejected = (rows(list(side), seed) for seed, side in enumerate(zip(*LENGTHS, strict=True)))
    made = []
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=True)):
        joined = {name: one[name] + other[name] for name in ("input_ids", "labels")}
        about = {"seq_lengths": [one["length"], other["length"]], "rejected": [0, 1], "index": number}
        made.append(joined | about)
    return made


def trained(arguments: Any, layout: Any = "padded", **options: Any) -> dict[str, torch.Tensor]:
    args = arguments(**options)
    trainer = DistillTrainer(
        tiny_model(1).double(),
        None,
        args,
        method=REDI(),
        train_dataset=pairs(),
        eval_dataset=pairs()[:3],
        data_collator=Collator(0, layout=layout),
    )
    trainer.networks.double()
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


def test_micro_batches_and_layouts_do_not_show(arguments) -> None:
    whole = trained(arguments, per_device_train_batch_size=6)
    start = dict(tiny_model(1).double().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 1e-4
    for layout, options in (
        ("padded", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}),
        ("padded", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("padding_free", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    ):
        for name, weight in trained(arguments, layout, **options).items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-6, atol=1e-6)


def test_evaluation_reads_the_chosen_side(arguments) -> None:
    trainer = DistillTrainer(
        tiny_model(1), None, arguments(), method=REDI(alpha=0.5), train_dataset=pairs(), eval_dataset=pairs()[:3]
    )
    found = trainer.evaluate()
    wanted = -found["eval_chosen_log_prob"] + 0.5 * found["eval_rejected_log_prob"]
    torch.testing.assert_close(found["eval_loss"], wanted, rtol=1e-4, atol=1e-5)
    assert {"eval_cross_entropy", "eval_accuracy", "eval_student_entropy"} <= found.keys()
