"""Where the teacher lives and how much it reads at once does not show in what is learnt."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks
from tiny_models import rows, tiny_model

from kdlm import DistillTrainer
from kdlm.data import Collator
from kdlm.losses import ForwardKL
from kdlm.methods import HiddenKD, LogitKD, Taid
from kdlm.teachers import AheadTeacher

LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9, 6, 7, 12, 4]
METHODS = {
    "logit_kd": lambda: LogitKD([ForwardKL(temperature=2.0)]),
    "taid": Taid,
    "hidden_kd": lambda: HiddenKD([ForwardKL()], layers=[(0, 1), (1, 2)]),
}


def trained(arguments, method, layout="padded", placed=None):
    """Train two steps in float64, evaluating after each; return weights, evaluations and the teacher."""
    teacher = tiny_model(2, hidden=24, layers=3).double()
    torch.manual_seed(5)  # projectors
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = DistillTrainer(
        tiny_model(1).double(),
        teacher if placed is None else AheadTeacher(teacher, **placed),
        arguments(**steps, eval_strategy="steps", eval_steps=1),
        method=METHODS[method](),
        train_dataset=rows(LENGTHS),
        eval_dataset=rows([4, 9, 6, 3, 8], seed=7),
        data_collator=Collator(0, layout=layout),
    )
    trainer.networks.double()
    trainer.train()
    seen = [{key: log[key] for key in log if key.startswith("eval_")} for log in trainer.state.log_history]
    for one in seen:
        for clock in ("runtime", "samples_per_second", "steps_per_second"):
            one.pop(f"eval_{clock}", None)
    return {name: p.detach().clone() for name, p in trainer.networks.named_parameters()}, seen, trainer.teacher


@pytest.mark.parametrize(("method", "layout"), [(name, "padded") for name in METHODS] + [("taid", "padding_free")])
def test_a_sliced_teacher_teaches_what_a_resident_one_does_bit_for_bit(arguments, method, layout):
    weights, seen, _ = trained(arguments, method, layout)
    other, seen_too, teacher = trained(arguments, method, layout, {"sliced": True})
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert seen == seen_too
    assert teacher.turns == 2 + 2 + (method == "hidden_kd")  # steps, evaluations; layers are not foreseen at first


@pytest.mark.parametrize(("size", "layout"), [(1, "padded"), (3, "padded"), (3, "padding_free"), (100, "padded")])
def test_the_teachers_batch_does_not_show_in_the_weights(arguments, size, layout):
    weights, seen, _ = trained(arguments, "hidden_kd", layout)
    other, seen_too, _ = trained(arguments, "hidden_kd", layout, {"sliced": size == 3, "batch_size": size})
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-11, atol=1e-11)
    assert seen_too == [pytest.approx(one, rel=1e-9) for one in seen]


def test_ranks_that_share_a_teacher_read_equally_often(tmp_path):
    """A teacher in shards: one rank has seven sequences for it, the other three, and one asks its own."""
    on_ranks(2, Path(__file__).with_name("two_ranks_ahead.py"), tmp_path)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()
