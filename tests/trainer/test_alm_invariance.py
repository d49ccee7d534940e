"""ALM's gradient is that of one global mean over chunks: batches, layouts, order and ranks do not show in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forks import on_ranks
from readers import reader
from safetensors.torch import load_file
from tiny_models import tiny_model
from two_tokenizers import OURS, THEIRS, pair_collator, paired_rows, unaligned, untrained

from kdlm import DistillTrainer
from kdlm.data.packing import best_fit, packed_row
from kdlm.losses import CrossEntropy
from kdlm.methods import ALM

METHODS = {
    "chunks": lambda: ALM([CrossEntropy(weight=0.3)]),
    "tokens": lambda: ALM(per="token", max_tokens=3, divergence="k2"),
    "debiased": lambda: ALM(debias=0.1),
}


def trained(arguments, method: str = "chunks", *, data: Any = None, layout: Any = "padded", **options):
    """Train one SGD step in float64 and return the student's weights."""
    trainer = DistillTrainer(
        tiny_model(1, vocab=len(reader(OURS))).double(),
        tiny_model(2, hidden=24, layers=3, vocab=len(reader(THEIRS))).double(),
        arguments(**options),
        method=METHODS[method](),
        train_dataset=paired_rows() if data is None else data,
        data_collator=pair_collator(layout=layout),
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.student.named_parameters()}


def assert_same(ours: dict, other: dict) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_batches_layouts_and_order_do_not_show(arguments, method: str) -> None:
    whole = trained(arguments, method)
    start = dict(tiny_model(1, vocab=len(reader(OURS))).double().named_parameters())
    assert max((whole[name] - start[name]).abs().max().item() for name in start) > 1e-3
    rows = paired_rows()
    assert_same(whole, trained(arguments, method, per_device_train_batch_size=1, gradient_accumulation_steps=len(rows)))
    assert_same(whole, trained(arguments, method, per_device_train_batch_size=3, gradient_accumulation_steps=3))
    assert_same(whole, trained(arguments, method, layout="padding_free"))
    assert_same(whole, trained(arguments, method, data=rows[::-1]))
    packed = [packed_row(rows[i] for i in members) for members in best_fit([row["length"] for row in rows], 64)]
    assert len(packed) < len(rows)
    assert_same(
        whole,
        trained(arguments, method, data=packed, layout="padding_free", per_device_train_batch_size=len(packed)),
    )


def test_rows_that_are_not_trained_on_change_nothing(arguments) -> None:
    rows = paired_rows()[:6]
    assert_same(trained(arguments, data=rows), trained(arguments, data=[*rows, *map(untrained, paired_rows()[6:])]))


def test_a_step_without_a_chunk_leaves_the_weights_where_they_were(arguments) -> None:
    start = dict(tiny_model(1, vocab=len(reader(OURS))).double().named_parameters())
    assert_same(start, trained(arguments, "tokens", data=list(map(unaligned, paired_rows()))))


def test_two_ranks_one_of_them_without_a_chunk_equal_one_process(arguments, tmp_path: Path) -> None:
    on_ranks(2, Path(__file__).with_name("two_ranks_alm.py"), tmp_path)
    one = trained(arguments, data=rank_rows(), max_steps=2)
    assert_same(one, load_file(tmp_path / "weights.safetensors"))


def rank_rows() -> list[dict[str, Any]]:
    """Eight rows, every second one without a chunk."""
    rows = paired_rows()
    return [unaligned(row) if number % 2 else row for number, row in enumerate(rows)]
