"""The gradient is that of one global mean: how the rows are cut into batches must not show in the weights."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks
from safetensors.torch import load_file
from tiny_models import rows, tiny_model

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.data.packing import best_fit, packed_row
from kdlm.losses import JSD, CrossEntropy, ForwardKL
from kdlm.methods import HiddenKD, LogitKD, Taid
from kdlm.teachers import Ensemble, Learned, LocalTeacher

LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9]
METHODS = {
    "logit_kd": lambda: LogitKD([ForwardKL(temperature=2.0), JSD(weight=0.5), CrossEntropy(weight=0.1)]),
    "taid": Taid,
    "hidden_kd": lambda: HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)]),
}


def trained(arguments, method: str = "logit_kd", *, layout: str = "padded", data=None, **options):
    """Train one SGD step in float64 and return the student's weights."""
    student, teacher = tiny_model(1).double(), tiny_model(2, hidden=24, layers=3).double()
    torch.manual_seed(5)  # projectors
    trainer = DistillTrainer(
        student,
        teacher,
        arguments(**options),
        method=METHODS[method](),
        train_dataset=rows(LENGTHS) if data is None else data,
        data_collator=Collator(0, layout=layout),
    )
    trainer.networks.double()
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


def assert_same(ours: dict, other: dict, tolerance: float = 1e-6) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(
            other[name], weight, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_eight_equals_eight_batches_of_one(arguments, method: str) -> None:
    whole = trained(arguments, method, per_device_train_batch_size=8)
    split = trained(arguments, method, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    uneven = trained(arguments, method, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert_same(whole, split)
    assert_same(whole, uneven)


def test_the_step_really_moves_the_weights(arguments) -> None:
    start = dict(tiny_model(1).double().named_parameters())
    moved = trained(arguments)
    assert max((moved[name] - start[name]).abs().max().item() for name in start) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_padding_free_equals_padded(arguments, method: str) -> None:
    assert_same(trained(arguments, method), trained(arguments, method, layout="padding_free"))


def test_packed_rows_equal_padded_rows(arguments) -> None:
    data = [{**row, "index": number} for number, row in enumerate(rows(LENGTHS))]
    packed = [packed_row(data[i] for i in bin) for bin in best_fit(LENGTHS, 32)]
    assert len(packed) < len(LENGTHS)
    one = trained(arguments, data=packed, layout="padding_free", per_device_train_batch_size=len(packed))
    assert_same(trained(arguments), one)


def test_rows_without_a_trained_token_change_nothing(arguments) -> None:
    ignored = [{**row, "labels": [-100] * row["length"]} for row in rows([7, 4], seed=9)]
    alone = trained(arguments, data=rows([5, 11, 3, 17, 8, 2]), per_device_train_batch_size=8)
    beside = trained(arguments, data=rows([5, 11, 3, 17, 8, 2]) + ignored, per_device_train_batch_size=8)
    assert_same(alone, beside)


def test_nothing_to_train_on_gives_loss_zero_and_leaves_the_weights(arguments) -> None:
    ignored = [{**row, "labels": [-100] * row["length"]} for row in rows([7, 4])]
    start = {name: p.detach().clone() for name, p in tiny_model(1).double().named_parameters()}
    assert_same(start, trained(arguments, data=ignored), tolerance=0.0)


def ensemble():
    both = [tiny_model(2, hidden=24, layers=3), tiny_model(3)]
    return Ensemble([LocalTeacher(model.double()) for model in both], Learned())


@pytest.mark.parametrize("kind", ["model", "ensemble"])
def test_two_ranks_equal_one_process(arguments, tmp_path: Path, kind: str) -> None:
    """Two gloo ranks of 1x4 against 1x8 here: three TAID steps, then evaluation of three rows, which ranks share."""
    on_ranks(2, Path(__file__).with_name("two_ranks.py"), tmp_path, "3", kind)
    trainer = DistillTrainer(
        tiny_model(1).double(),
        ensemble() if kind == "ensemble" else tiny_model(2, hidden=24, layers=3).double(),
        arguments(max_steps=3),
        method=Taid(),
        train_dataset=rows(LENGTHS),
        eval_dataset=rows([4, 9, 6], seed=7),
    )
    trainer.train()
    assert_same(dict(trainer.student.named_parameters()), load_file(tmp_path / "weights.safetensors"))
    ranks = load_file(tmp_path / "metrics.safetensors")
    here = trainer.evaluate()
    for name in ("eval_loss", "eval_cross_entropy", "eval_kl_to_teacher", "eval_top1_agreement"):
        assert ranks[name].item() == pytest.approx(here[name], rel=1e-5)
